"""The whole step compared with an independent implementation in plain PyTorch.

Of frostline, it only uses the loader of the weights and SFace, which other tests compare with ONNX Runtime. It calls
diffsynth's `model_fn_wan_video` and VAE, one sample at a time; facenet-pytorch's `MTCNN.detect`, one frame at a time;
scikit-image's similarity transform; and peft's LoRA on one copy of the denoiser, with another copy without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffsynth.pipelines.wan_video import model_fn_wan_video
from facenet_pytorch import MTCNN
from peft import LoraConfig, inject_adapter_in_model
from skimage.transform import SimilarityTransform
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.faces import SFaceEmbedder
from frostline.models.tiny.clips import held_out_clips
from frostline.models.wan.components import WanComponents
from frostline.train import WanTrainingModule

if TYPE_CHECKING:
    from conftest import RewardTape

N, SHIFT, MID, FINAL, SEED = 8, 5.0, 4, 7, 24
BASELINE, SCALE, WEIGHT, KL_WEIGHT, BOUNDARY = 0.54, 0.16, 0.1, 1.0, 0.9
ARCFACE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]


@dataclass
class Faces:
    """The largest face of each frame with a face.

    Attributes:
        landmarks: the five landmarks (5, 2), by frame.
    """

    landmarks: dict[int, np.ndarray] = field(default_factory=dict)


def detect(detector: MTCNN, frames: Tensor) -> Faces:
    """Detect the faces of (T, 3, H, W) uint8 frames, one frame at a time."""
    faces = Faces()
    for index, frame in enumerate(frames):
        boxes, _, landmarks = detector.detect(frame.permute(1, 2, 0).numpy(), landmarks=True)
        if boxes is not None:
            boxes = np.asarray(boxes, dtype=np.float64)
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            faces.landmarks[index] = np.asarray(landmarks, dtype=np.float64)[area.argmax()]
    return faces


def align(frame: Tensor, landmarks: np.ndarray) -> Tensor:
    """Return the differentiable 112×112 crop (3, 112, 112) of a frame (3, H, W) in [0, 1]."""
    to_crop = SimilarityTransform()
    assert to_crop.estimate(landmarks, np.array(ARCFACE))
    column, row = np.meshgrid(np.arange(112), np.arange(112))
    x, y = to_crop.inverse(np.stack([column.ravel(), row.ravel()], axis=1)).T
    height, width = frame.shape[-2:]
    # Convert pixel centres at integers to the coordinates of `grid_sample`, -1 to 1 from border to border.
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=1).reshape(1, 112, 112, 2)
    return F.grid_sample(frame[None], torch.from_numpy(grid).float(), padding_mode="zeros", align_corners=False)[0]


class ScoredFrames:
    """The frames of one sample as inputs of the reward, tied to what `tape` recorded of the module's frames.

    `RewardTape` explains why this is needed.
    """

    faces: Faces

    def __init__(self, tape: "RewardTape", index: int) -> None:
        self.tape = tape
        self.sample = slice(index, index + 1)

    def pixels(self, frames: Tensor) -> Tensor:
        """Return the module's 8-bit pixels (T, 3, H, W), and check that those of `frames` only differ by rounding."""
        frames.register_hook(self._gradient)
        recorded = self.tape.pixels[self.sample][0]
        difference = (to_pixels(frames).float() - recorded.float()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
        return recorded

    def _gradient(self, gradient: Tensor) -> Tensor | None:
        exchanged = self.tape.exchange(gradient[None], self.sample)
        return None if exchanged is None else exchanged[0]


class Reference:
    """The independent implementation for one model.

    Args:
        name: the model.
        lora: the adapter matrices of the policy by peft's names.
        rank: the rank of the LoRA.
    """

    def __init__(self, name: str, lora: dict[str, Tensor], rank: int) -> None:
        self.parts: WanComponents = load_components(name)
        self.base = load_components(name).denoiser
        self.policy = self.parts.denoiser
        targets = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self.policy)
        self.lora = {key: p for key, p in self.policy.named_parameters() if "lora_" in key}
        assert self.lora.keys() == lora.keys()
        with torch.no_grad():
            for key, parameter in self.lora.items():
                parameter.copy_(lora[key])
        self.detector = MTCNN(keep_all=True, device="cpu")
        self.embed = SFaceEmbedder()

    def step(self, prompt: str, video: Tensor, scored: ScoredFrames) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, face score and KL of one sample; `video` is (T, 3, H, W) in [0, 1]."""
        with torch.no_grad():
            conditions, first_frame = self.condition(prompt, video)
            references = self.references(video)
        x = self.noise(video)
        kl = []
        for i in range(N):
            if i < MID:
                with torch.no_grad():
                    v = self.velocity(self.policy, x, i, conditions)
            else:
                v = self.velocity(self.policy, x, i, conditions)
                with torch.no_grad():
                    v_base = self.velocity(self.base, x, i, conditions)
                kl.append(((v - v_base) ** 2).mean() / (2 * sigma(i) ** 2))
            x = x + (sigma(i + 1) - sigma(i)) * v
            if first_frame is not None and i < N - 1:
                x = torch.cat([first_frame, x[:, :, 1:]], dim=2)
            if i == FINAL:
                break
        frames = self.decode(x)
        score, valid = self.score(frames, scored, references)
        kl_loss = torch.stack(kl).mean()
        reward = -(score - BASELINE) / SCALE * WEIGHT if valid else 0 * score
        return reward + KL_WEIGHT * kl_loss, score, kl_loss

    def condition(self, prompt: str, video: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        ids, mask = self.parts.tokenizer([prompt], return_mask=True, add_special_tokens=True)
        context = self.parts.text_encoder(ids, mask)
        context[:, int(mask.sum()) :] = 0
        image = (video[:1] * 2 - 1).transpose(0, 1)[None]
        vae = self.parts.vae
        if self.policy.seperated_timestep:
            self.first_frame = vae.model.encode(image, vae.scale)
            return {"context": context}, self.first_frame
        T, _, H, W = video.shape
        latents = vae.model.encode(torch.cat([image, torch.zeros(1, 3, T - 1, H, W)], dim=2), vae.scale)
        mask = torch.zeros(1, 4, *latents.shape[2:])
        mask[:, :, 0] = 1
        return {"context": context, "y": torch.cat([mask, latents], dim=1)}, None

    def noise(self, video: Tensor) -> Tensor:
        T, _, H, W = video.shape
        shape = (1, 16, (T - 1) // 4 + 1, H // 8, W // 8)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        return torch.cat([self.first_frame, x[:, :, 1:]], dim=2) if self.policy.seperated_timestep else x

    def velocity(self, low_noise: Any, x: Tensor, i: int, conditions: dict[str, Tensor]) -> Tensor:
        expert = self.parts.denoiser_high_noise
        dit = expert if expert is not None and 1000 * sigma(i) >= 1000 * BOUNDARY else low_noise
        return model_fn_wan_video(
            dit=dit,
            latents=x,
            timestep=torch.tensor([1000 * sigma(i)]),
            fuse_vae_embedding_in_latents=dit.seperated_timestep,
            **conditions,
        )

    def decode(self, x: Tensor) -> Tensor:
        """Return the decoded frames (T, 3, H, W) in [0, 1]."""
        video = self.parts.vae.model.decode(x, self.parts.vae.scale).clamp(-1, 1)
        return (video[0].transpose(0, 1) + 1) / 2

    def embeddings(self, frames: Tensor, faces: Faces) -> list[Tensor]:
        crops = [align(frames[index], landmarks) for index, landmarks in faces.landmarks.items()]
        return [self.embed(2 * crop[None] - 1)[0] for crop in crops]

    def references(self, video: Tensor) -> list[Tensor]:
        return self.embeddings(video[1:], detect(self.detector, to_pixels(video[1:])))

    def score(self, frames: Tensor, scored: ScoredFrames, references: list[Tensor]) -> tuple[Tensor, bool]:
        faces = scored.faces = detect(self.detector, scored.pixels(frames))
        if not faces.landmarks or not references:
            return 0 * frames.sum(), False
        means = [
            torch.stack([F.cosine_similarity(e, g, dim=0) for g in references]).mean()
            for e in self.embeddings(frames, faces)
        ]
        return torch.stack(means).mean(), True


def sigma(i: int) -> float:
    u = 1 - i / N
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def to_pixels(frames: Tensor) -> Tensor:
    return (frames.detach() * 255).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-ti2v"])
def test_the_whole_step_equals_an_independent_implementation(
    model: str, make_module: Callable[..., WanTrainingModule], tape: "RewardTape"
) -> None:
    count = 2 if model == "tiny" else 1
    clips = held_out_clips(count, seed=11, num_frames=5)
    module = make_module(model, kl_weight=KL_WEIGHT)
    with tape.record(module):
        step = module({"prompt": clips.prompts, "video": clips.video})
    step[0].backward()
    metrics = module.last_metrics
    assert metrics is not None
    lora = module.trainable_parameters()
    reference = Reference(model, {name: p.detach() for name, p in lora.items()}, rank=8)

    steps = []
    for index, (prompt, video) in enumerate(zip(clips.prompts, clips.video, strict=True)):
        scored = ScoredFrames(tape, index)
        steps.append(reference.step(prompt, video, scored))
        assert len(scored.faces.landmarks) == round(metrics.per_sample["detection_rate"][index] * len(video))
    if model == "tiny":
        assert min(metrics.per_sample["detection_rate"]) > 0, "no reward was compared"
    losses, scores, kls = (torch.stack(values) for values in zip(*steps, strict=True))
    valid = torch.tensor(metrics.per_sample["detection_rate"]) > 0
    torch.testing.assert_close(torch.tensor(metrics.per_sample["face_score"]), scores.detach(), atol=1e-5, rtol=0)
    # A sample without a face gives no reward, and the reward is the mean over the other samples.
    rewards = torch.where(valid, losses - KL_WEIGHT * kls, 0).sum() / valid.sum().clamp(min=1)
    loss = rewards + KL_WEIGHT * kls.mean()
    torch.testing.assert_close(step[0], loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(step[1], (scores * valid).sum() / valid.sum().clamp(min=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(step[2], kls.mean(), atol=1e-5, rtol=0)

    expected = flat_gradient(lora)
    loss.backward(retain_graph=True)
    assert_same_gradient(flat_gradient(reference.lora), expected, norm=2e-3)
    tape.holds_gradient = True
    loss.backward()
    assert_same_gradient(flat_gradient(reference.lora), expected, norm=1e-4)


def flat_gradient(parameters: dict[str, Any]) -> Tensor:
    """Return the flat gradient of all parameters in the order of their names, and delete it."""
    parts = [parameters[name].grad.flatten() for name in sorted(parameters)]
    for parameter in parameters.values():
        parameter.grad = None
    return torch.cat(parts).double()


def assert_same_gradient(own: Tensor, expected: Tensor, norm: float) -> None:
    assert F.cosine_similarity(own, expected, dim=0) >= 0.99999
    assert (own.norm() / expected.norm() - 1).abs() <= norm
