"""Run one training step like the reference implementation, with the weights and the LoRA of a frostline module.

It calls the unmodified functions of diffsynth: `model_fn_wan_video`, with all blocks recomputed in backward, and the
VAE's `encode` and `decode`. Faces are detected with facenet-pytorch's `MTCNN.detect`, one frame at a time. The
reference only supports a batch size of 1, so samples are processed one by one, and their gradients are accumulated. All
frozen outputs are computed in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from shapes import face_reward
from torch import Tensor

from frostline.models.faces.detections import Detections, upscale_frames
from frostline.models.faces.identity import FaceIdentity, ReferenceFaces, identity_score
from frostline.models.lora.inject import adapters_off
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.wan.video_shape import TEMPORAL_STRIDE
from frostline.runtime.backends import TORCH

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE

    from frostline.train import WanTrainingModule

# Number of mask channels in `y`; they mark which of the four video frames of a latent frame are given.
_MASK_CHANNELS = 4


class FrameByFrameDetector:
    """Detect faces with facenet-pytorch frame by frame, with the interface of frostline's detectors."""

    def __init__(self, min_face_size: int, device: torch.device) -> None:
        from facenet_pytorch import MTCNN

        self._mtcnn = MTCNN(keep_all=True, min_face_size=min_face_size, device=device)
        self._device = device

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Return the faces of (N, 3, H, W) uint8 frames, which are enlarged by `upscale` for detection."""
        larger = upscale_frames(frames, upscale)
        boxes, probabilities, landmarks, index = [], [], [], []
        for number, frame in enumerate(larger.permute(0, 2, 3, 1)):
            found: Any = self._mtcnn.detect(frame.cpu().numpy(), landmarks=True)
            if found[0] is None:
                continue
            boxes.append(torch.as_tensor(found[0].astype("float32")).reshape(-1, 4))
            probabilities.append(torch.as_tensor(found[1].astype("float32")))
            landmarks.append(torch.as_tensor(found[2].astype("float32")).reshape(-1, 5, 2))
            index.append(torch.full((len(found[0]),), number))
        height, width = larger.shape[-2:]
        return Detections(
            torch.cat([torch.zeros(0, 4), *boxes]).to(self._device),
            torch.cat([torch.zeros(0), *probabilities]).to(self._device),
            torch.cat([torch.zeros(0, 5, 2), *landmarks]).to(self._device),
            torch.cat([torch.zeros(0, dtype=torch.int64), *index]).to(self._device),
            num_frames=len(frames),
            frame_size=(height, width),
        ).divided(upscale)


class ReferenceStep:
    """Run forward and backward on a batch.

    Args:
        module: provides the denoiser, text encoder, face embedder and settings; it is not called.
        vae: the VAE, or a copy of it with another implementation of convolutions.
    """

    def __init__(self, module: WanTrainingModule, vae: WanVideoVAE) -> None:
        self.module = module
        self.components = module.components
        self.settings = module.settings
        self._reward = face_reward(module).config
        self.vae = vae
        self.schedule = FlowMatchSchedule(self.settings.num_inference_steps, self.settings.shift)
        reward = self._reward
        weight = self.components.denoiser.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        embedder: Any = face_reward(module).faces.embedder
        detector = FrameByFrameDetector(reward.min_face_size, self.device)
        self.faces = FaceIdentity(detector, embedder, reward.upscale, reward.missing_face)

    def __call__(self, batch: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return loss, face score and KL loss as means over the samples. Gradients accumulate in the LoRA weights."""
        rows = [*zip(batch["prompt"], batch["video"], strict=True)]
        samples = []
        for prompt, video in rows:
            loss, face_score, kl_loss = self._forward(prompt, video[None].to(self.device))
            with self._time("backward"):
                (loss / len(rows)).backward()
            samples.append((loss.item(), face_score.item(), kl_loss.item()))
        loss, face_score, kl_loss = torch.tensor(samples).mean(dim=0).tolist()
        return loss, face_score, kl_loss

    def _forward(self, prompt: str, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, face score and KL loss of one sample; `video` is (1, T, 3, H, W) in [0, 1]."""
        with torch.no_grad():
            given = self._condition(prompt, video)
            references = self._references(video)
        latents, kl_loss = self._denoise(self._noise(video), given)
        with self._time("vae_decoder_live"):
            decoded = self.vae.model.decode(latents.to(self.dtype), self.vae.scale).clamp(-1, 1)
            self.vae.model.clear_cache()
        face_score = self._score((decoded.float().transpose(1, 2) + 1) / 2, references)
        reward = self._reward
        loss = -(face_score - reward.baseline) / reward.scale * reward.weight + self.settings.kl_weight * kl_loss
        return loss, face_score, kl_loss

    def _condition(self, prompt: str, video: Tensor) -> dict[str, Tensor]:
        components = self.components
        with self._time("text_encoder"):
            ids, mask = components.tokenizer([prompt], return_mask=True, add_special_tokens=True)
            context = components.text_encoder(ids.to(self.device), mask.to(self.device))
            context[:, int(mask.sum()) :] = 0
        first = (video[:, :1] * 2 - 1).transpose(1, 2).to(self.dtype)
        later = first.new_zeros(1, 3, video.shape[1] - 1, *video.shape[-2:])
        with self._time("vae_encoder"):
            latents = self.vae.model.encode(torch.cat([first, later], dim=2), self.vae.scale)
            self.vae.model.clear_cache()
        mask = latents.new_zeros(1, _MASK_CHANNELS, *latents.shape[2:])
        mask[:, :, 0] = 1
        return {"context": context, "y": torch.cat([mask, latents], dim=1)}

    def _references(self, video: Tensor) -> ReferenceFaces:
        frames = video[:, 1:]
        with self._time("face_detector"):
            faces = self.faces.detect(frames)
        with self._time("face_embedder"):
            return ReferenceFaces(self.faces.embed(frames, faces), faces.found)

    def _noise(self, video: Tensor) -> Tensor:
        frames, (height, width) = (video.shape[1] - 1) // TEMPORAL_STRIDE + 1, video.shape[-2:]
        stride = self.components.spec.geometry.spatial_stride
        shape = (1, self.vae.model.z_dim, frames, height // stride, width // stride)
        assert self.settings.noise_seed is not None
        generator = torch.Generator().manual_seed(self.settings.noise_seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def _denoise(self, latents: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return latents and KL loss after the rollout head and the tail."""
        settings, kl = self.settings, []
        for index in range(settings.grad_end_step + 1):
            if index < settings.grad_start_step:
                with torch.no_grad(), self._time("denoiser"):
                    velocity = self._velocity(latents, index, given)
            else:
                with self._time("denoise_tail"):
                    velocity = self._velocity(latents, index, given)
                with torch.no_grad(), self._time("denoiser"), adapters_off(self.components.denoiser):
                    base = self._velocity(latents, index, given)
                kl.append((velocity - base).pow(2).mean() / (2 * float(self.schedule.sigmas[index]) ** 2))
            latents = self.schedule.step(latents, velocity, index)
        return latents, torch.stack(kl).mean()

    def _velocity(self, latents: Tensor, index: int, given: Mapping[str, Any]) -> Tensor:
        from diffsynth.pipelines.wan_video import model_fn_wan_video

        timestep = torch.tensor([float(self.schedule.timesteps[index])], device=self.device)
        # The pipeline of diffsynth rounds the timestep to bf16 (937.5 becomes 936). Here, only its sinusoidal embedding
        # is rounded, so that all contenders use the same timestep.
        rounding = self.components.denoiser.time_embedding.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].to(self.dtype),)
        )
        try:
            velocity = model_fn_wan_video(
                dit=self.components.denoiser,
                latents=latents.to(self.dtype),
                timestep=timestep,
                use_gradient_checkpointing=True,
                **given,
            )
        finally:
            rounding.remove()
        return velocity.float()

    def _score(self, frames: Tensor, references: ReferenceFaces) -> Tensor:
        with self._time("face_detector"):
            found = self.faces.detect(frames)
        with self._time("face_embedder_live"):
            embeddings = self.faces.embed(frames, found)
        score = identity_score(
            embeddings, found.found, references.embeddings, references.found, self._reward.missing_face
        )
        assert score.valid.all(), "no face was found in a sample, but the reference needs one: use other clips"
        return score.face_score.mean()

    def _time(self, stage: str) -> AbstractContextManager[None]:
        return self.module.runtime.clock.measure(stage, TORCH)
