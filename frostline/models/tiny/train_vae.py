"""Train the tiny VAE: first on images, then on clips, and finally only the decoder with a face identity loss."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_vae import Resample, VideoVAE_, WanVideoVAE
from torch import Tensor, nn

from .architecture import VAE
from .clips import NUM_FRAMES, Clips, held_out_clips, render_clips
from .training import Phase, autocast, psnr, run_phase

_UNIT_SCALE = [torch.zeros(VAE["z_dim"]), torch.ones(VAE["z_dim"])]
_IMAGES, _CLIPS = 8, 2


def build_vae() -> VideoVAE_:
    """Return a VAE initialised to preserve variance; with the default init, training stalls at the mean image."""
    vae = VideoVAE_(**VAE)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not name.endswith("proj"):
            fan_in = module.weight[0].numel()
            # A causal 3×3×3 kernel sees one to three real frames, after zeros at the start of a clip. Two are assumed.
            if module.kernel_size == (3, 3, 3):
                fan_in = fan_in * 2 // 3
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in vae.modules():
        if isinstance(module, Resample) and hasattr(module, "time_conv"):
            init = module.init_weight2 if module.mode == "upsample3d" else module.init_weight
            init(module.time_conv)
    return vae


def train_autoencoder(vae: VideoVAE_, steps: int, work: Path) -> None:
    """Train both parts with L1 and L2 pixel losses, an L1 loss of image gradients, and an L2 penalty on the latents."""

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        if step < 0.35 * steps or step % 4 == 3:
            frame = int(torch.randint(0, NUM_FRAMES, (1,), generator=generator))
            clips = render_clips(_IMAGES, generator, only_frame=frame)
        else:
            clips = render_clips(_CLIPS, generator)
        video = _to_vae(clips.video)
        with autocast():
            latents = vae.encode(video, _UNIT_SCALE)
            noise = 0.05 * latents.detach().std() * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents + noise, _UNIT_SCALE)
        return _reconstruction_loss(decoded.float(), video) + 1e-4 * latents.float().pow(2).mean()

    phase = Phase("autoencoder", vae, list(vae.parameters()), steps, learning_rate=1e-3, warmup=30)
    run_phase(phase, loss_at, lambda: {"psnr": _held_out_psnr(vae)}, work)


def train_decoder(vae: VideoVAE_, steps: int, work: Path) -> None:
    """Train only the decoder with a face identity loss, so that decoded faces are recognisable."""
    from frostline.models.faces.alignment import align_faces
    from frostline.models.faces.detections import quantize_frames
    from frostline.models.faces.embedders import SFaceEmbedder
    from frostline.models.faces.mtcnn import BatchedMTCNN

    embedder = SFaceEmbedder()
    detector = BatchedMTCNN()
    parameters = [*vae.decoder.parameters(), *vae.conv2.parameters()]

    def embed(frames: Tensor, landmarks: Tensor) -> Tensor:
        return embedder(align_faces(frames * 2 - 1, landmarks))

    def identity_loss(decoded: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
        pick = torch.randperm(truth.shape[1], generator=generator)[:4]
        truth, decoded = truth[:, pick].flatten(0, 1), decoded[:, pick].flatten(0, 1)
        landmarks = detector.detect(quantize_frames(truth)).largest().landmarks
        with torch.no_grad():
            target = embed(truth, landmarks)
        return (1 - (embed(decoded, landmarks) * target).sum(-1)).mean()

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        clips = render_clips(_CLIPS, generator)
        video = _to_vae(clips.video)
        with autocast():
            with torch.no_grad():
                latents = vae.encode(video, _UNIT_SCALE)
            latents = latents + 0.05 * latents.std() * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents, _UNIT_SCALE)
        decoded = decoded.float()
        pixels = _reconstruction_loss(decoded, video)
        return pixels + 0.1 * identity_loss(_from_vae(decoded), clips.video, generator)

    phase = Phase("decoder", vae, parameters, steps, learning_rate=7e-4, warmup=30)
    run_phase(phase, loss_at, lambda: {"psnr": _held_out_psnr(vae)}, work)


@torch.no_grad()
def to_official_latents(vae: VideoVAE_, batches: int = 24) -> None:
    """Fold the mean and standard deviation of the latents into the adjacent 1×1×1 convolutions.

    `WanVideoVAE` normalises latents with the constants of the official Wan VAE. After this, these constants also give
    unit-variance latents for the tiny model, so that it needs no special loading code.
    """
    generator = torch.Generator().manual_seed(77)
    latents = torch.cat([_encode(vae, render_clips(2, generator)) for _ in range(batches)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    official = WanVideoVAE()
    gain = official.std / std
    encode, decode = vae.conv1, vae.conv2
    z = VAE["z_dim"]
    encode.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    encode.bias[:z] = (encode.bias[:z] - mean) * gain + official.mean  # type: ignore[index]
    # z_own = (z - official.mean) / gain + mean
    decode.bias += (decode.weight[:, :, 0, 0, 0] * (mean - official.mean / gain)).sum(1)  # type: ignore[operator]
    decode.weight /= gain.view(1, -1, 1, 1, 1)


def _encode(vae: VideoVAE_, clips: Clips) -> Tensor:
    with autocast():
        return vae.encode(_to_vae(clips.video), _UNIT_SCALE).float()


def _to_vae(video: Tensor) -> Tensor:
    return video.transpose(1, 2) * 2 - 1


def _from_vae(video: Tensor) -> Tensor:
    return ((video + 1) / 2).transpose(1, 2)


def _image_gradients(video: Tensor) -> Iterator[Tensor]:
    yield video[..., 1:, :] - video[..., :-1, :]
    yield video[..., 1:] - video[..., :-1]


def _reconstruction_loss(decoded: Tensor, video: Tensor) -> Tensor:
    error = decoded - video
    loss = error.abs().mean() + 0.5 * error.pow(2).mean()
    for of_decoded, of_video in zip(_image_gradients(decoded), _image_gradients(video), strict=True):
        loss = loss + 0.5 * F.l1_loss(of_decoded, of_video)
    return loss


@torch.no_grad()
def _held_out_psnr(vae: VideoVAE_) -> float:
    video = held_out_clips(4, seed=77).video
    with autocast():
        decoded = vae.decode(vae.encode(_to_vae(video), _UNIT_SCALE), _UNIT_SCALE)
    return psnr(_from_vae(decoded.float()).clamp(0, 1), video)
