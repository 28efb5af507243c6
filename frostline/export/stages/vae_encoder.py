"""`vae_encoder`: video (B, 3, 4k + 1, H, W) in [-1, 1] to normalised latents (B, C, k + 1, H/8, W/8).

Two networks, the first frame and the next four with their caches as tensors, serve a video of any length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frostline.models.geometry import TEMPORAL_STRIDE
from frostline.models.vae_chunks import VaeEncoderFirst, VaeEncoderNext, encode_in_chunks
from frostline.runtime.stage import Runner, Stage, TensorSpec

from .inputs import StageInputs, tolerance
from .vae_chunks import chunk_networks


def build(inputs: StageInputs) -> Stage:
    """The stage, its torch side diffsynth's own `encode`."""
    vae, shapes = inputs.components.vae, inputs.shapes
    modules = tuple(kind(vae).to(inputs.device).eval() for kind in (VaeEncoderFirst, VaeEncoderNext))
    batch, height, width = shapes.dimension("batch"), inputs.pixels("height"), inputs.pixels("width")
    first, following = (
        TensorSpec("video", (batch, 3, frames, height, width), inputs.dtype) for frames in (1, TEMPORAL_STRIDE)
    )

    def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
        return {"latents": vae.model.encode(tensors["video"], vae.scale)}

    def assemble(runners: Mapping[str, Runner]) -> Runner:
        return lambda **tensors: {"latents": encode_in_chunks(runners, tensors["video"])}

    def sample() -> dict[str, Tensor]:
        frames = TEMPORAL_STRIDE * (shapes.latent_frames[1] - 1) + 1
        shape = (shapes.batch[1], 3, frames, shapes.height[1], shapes.width[1])
        clip = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
        return {"video": clip.to(inputs.device, inputs.dtype)}

    return Stage(
        name="vae_encoder",
        model=inputs.components.name,
        networks=chunk_networks(
            inputs, (modules[0], modules[1]), (first, following), "latents", inputs.components.spatial_multiple
        ),
        torch=in_torch,
        assemble=assemble,
        sample=sample,
        tolerance=tolerance("vae_encoder", inputs.dtype),
        weights=inputs.components.weights.get("vae_encoder"),
    )
