"""Build the models of the benchmarks: the built-in tiny model, and Wan2.1-1.3B's size with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import RELEASED
from frostline.models.faces import ChosenFaces, FaceIdentity
from frostline.models.tiny.clips import held_out_clips
from frostline.models.wan.components import WanComponents
from frostline.rewards.active import RewardStages
from frostline.rewards.build import build_rewards
from frostline.rewards.config import default_rewards
from frostline.rewards.face_identity.reward import FaceIdentityReward
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange
from frostline.train import WanTrainingModule

TINY = "tiny"
WAN_1_3B = "wan2.1-1.3b"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The config.json of Wan2.1-T2V-1.3B, with the differences stated in the comments.
DENOISER: dict[str, Any] = {
    "dim": 1536,
    "in_dim": 36,  # 16 noisy channels, and the image latents with their mask, as in image-to-video models
    "ffn_dim": 8960,
    "out_dim": 16,
    "text_dim": 64,  # of the tiny text encoder; the real one has 5.7 billion weights, and runs once per prompt
    "freq_dim": 256,
    "eps": 1e-6,
    "patch_size": (1, 2, 2),
    "num_heads": 12,
    "num_layers": 30,
    "has_image_input": False,
    "require_clip_embedding": False,
    "require_vae_embedding": True,
    "seperated_timestep": False,
    "fuse_vae_embedding_in_latents": False,
}
_PROMPT_TOKENS = 512


def build_components(name: str, dtype: torch.dtype, device: torch.device) -> WanComponents:
    """Return the components of `tiny` or `wan2.1-1.3b`.

    `wan2.1-1.3b` has a denoiser and a VAE of full size with random weights, and the text encoder of `tiny`.
    """
    components = load_components(TINY, dtype, device)
    if name == TINY:
        return components
    components.tokenizer.seq_len = _PROMPT_TOKENS
    spec = replace(
        components.spec,
        name="wan-1.3b-shaped",
        networks={**components.spec.networks, "denoiser": DENOISER, "vae": RELEASED["Wan2.1-T2V-1.3B"]["vae"]},
        text_length=_PROMPT_TOKENS,
    )
    return replace(components, spec=spec, denoiser=random_denoiser(dtype, device), vae=_random_vae(dtype, device))


def see_faces_everywhere(faces: FaceIdentity) -> FaceIdentity:
    """Treat every frame as having a face. The detector runs as usual.

    Models with random weights generate no faces, and without a face, the loss has no gradient.
    """
    detect = faces.detect

    def looked_at(frames: Tensor, reference_mean: Tensor | None = None) -> ChosenFaces:
        found = detect(frames, reference_mean)
        return replace(found, found=torch.ones_like(found.found))

    faces.detect = looked_at  # pyright: ignore[reportAttributeAccessIssue]
    return faces


def face_reward(module: WanTrainingModule) -> FaceIdentityReward:
    """Return the first reward of a module, which must be `face_identity`."""
    reward = module.rewards[0].reward
    assert isinstance(reward, FaceIdentityReward)
    return reward


def face_stages(shapes: ShapeRange, device: torch.device | str = "cpu") -> list[Stage]:
    """Return the stages of the default reward, `face_identity`."""
    return [stage for active in build_rewards(default_rewards(), device, shapes) for stage in active.stages]


def reward_faces_everywhere(module: WanTrainingModule) -> None:
    """Make the reward of a module treat every frame as having a face; see `see_faces_everywhere`."""
    reward = face_reward(module)
    identity = reward.identity

    def everywhere(run: RewardStages) -> FaceIdentity:
        return see_faces_everywhere(identity(run))

    reward.identity = everywhere  # pyright: ignore[reportAttributeAccessIssue]


def clips_of(video: str) -> dict[str, Any]:
    """Return a batch of validation clips with a shape such as 2x9x3x96x96: prompts, and the video in [0, 1]."""
    count, frames, _, height, width = (int(part) for part in video.split("x"))
    clips = held_out_clips(count, seed=0, num_frames=frames, size=max(height, width))
    return {"prompt": clips.prompts, "video": clips.video[..., :height, :width].contiguous()}


@torch.no_grad()
def spread_lora(module: WanTrainingModule) -> None:
    """Initialize the LoRA randomly: with B matrices of zeros, the KL term and the gradients of A are zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters().values():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def random_denoiser(dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return a denoiser with 1.4 billion random weights, created in `dtype` on `device`: fp32 would take 5.7 GB."""
    from diffsynth.models.wan_video_dit import WanModel

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WanModel(**DENOISER)
    finally:
        torch.set_default_dtype(default)
    # The rotary tables must be on the CPU, even if the model is created on another device.
    frames, rows, columns = (table.to("cpu") for table in model.freqs)
    model.freqs = frames, rows, columns
    return model.eval().requires_grad_(False)


def _random_vae(dtype: torch.dtype, device: torch.device) -> Any:
    from diffsynth.models.wan_video_vae import WanVideoVAE

    torch.manual_seed(0)
    vae = WanVideoVAE().to(device, dtype)
    vae.scale = [part.to(device) for part in vae.scale]
    return vae.eval().requires_grad_(False)
