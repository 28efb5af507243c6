"""The models that benchmarks run: the embedded tiny one, and Wan2.1's 1.3B shape with random weights."""

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

# Wan2.1-T2V-1.3B as its config.json has it, but for what is said beside it.
DENOISER: dict[str, Any] = {
    "dim": 1536,
    "in_dim": 36,  # the image latents and their mask join the 16 noisy channels, as in image-to-video models
    "ffn_dim": 8960,
    "out_dim": 16,
    "text_dim": 64,  # the tiny text encoder's: the real one has 5.7 billion weights and runs once a prompt
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
    """`tiny`, or `wan2.1-1.3b`: denoiser and VAE of full size with random weights, the text encoder tiny's."""
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
    """Take every frame for a face, after the detector has looked at it as ever.

    What random weights paint has none, and a step without faces is no step: its loss has no gradient.
    """
    detect = faces.detect

    def looked_at(frames: Tensor, reference_mean: Tensor | None = None) -> ChosenFaces:
        found = detect(frames, reference_mean)
        return replace(found, found=torch.ones_like(found.found))

    faces.detect = looked_at  # pyright: ignore[reportAttributeAccessIssue]
    return faces


def face_reward(module: WanTrainingModule) -> FaceIdentityReward:
    """The first reward of a module, which is that of faces."""
    reward = module.rewards[0].reward
    assert isinstance(reward, FaceIdentityReward)
    return reward


def face_stages(shapes: ShapeRange, device: torch.device | str = "cpu") -> list[Stage]:
    """Those of the reward that there is by default."""
    return [stage for active in build_rewards(default_rewards(), device, shapes) for stage in active.stages]


def reward_faces_everywhere(module: WanTrainingModule) -> None:
    """Let a module's reward take every frame for a face; see `see_faces_everywhere`."""
    reward = face_reward(module)
    identity = reward.identity

    def everywhere(run: RewardStages) -> FaceIdentity:
        return see_faces_everywhere(identity(run))

    reward.identity = everywhere  # pyright: ignore[reportAttributeAccessIssue]


def clips_of(video: str) -> dict[str, Any]:
    """Held-out clips of a shape such as 2x9x3x96x96, as a step takes them."""
    count, frames, _, height, width = (int(part) for part in video.split("x"))
    clips = held_out_clips(count, seed=0, num_frames=frames, size=max(height, width))
    return {"prompt": clips.prompts, "video": clips.video[..., :height, :width].contiguous()}


@torch.no_grad()
def spread_lora(module: WanTrainingModule) -> None:
    """A policy of its own: with the B matrices at zero there is no KL term and half of the gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters().values():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def random_denoiser(dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """1.4 billion weights, made in their own type and place: a copy in fp32 would be 5.7 GB more."""
    from diffsynth.models.wan_video_dit import WanModel

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WanModel(**DENOISER)
    finally:
        torch.set_default_dtype(default)
    # Where the model is given a device to be made on, its rotary tables stay behind.
    frames, rows, columns = (table.to("cpu") for table in model.freqs)
    model.freqs = frames, rows, columns
    return model.eval().requires_grad_(False)


def _random_vae(dtype: torch.dtype, device: torch.device) -> Any:
    from diffsynth.models.wan_video_vae import WanVideoVAE

    torch.manual_seed(0)
    vae = WanVideoVAE().to(device, dtype)
    vae.scale = [part.to(device) for part in vae.scale]
    return vae.eval().requires_grad_(False)
