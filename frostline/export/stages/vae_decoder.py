"""`vae_decoder`, frozen: normalised latents (B, C, F, H/8, W/8) to a video (B, 3, 4F - 3, H, W) in [-1, 1].

For sampling and validation; and in training for the first forward of what backward recomputes. Two networks, the
first latent frame and the next with their caches as tensors, serve a video of any length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frostline.models.vae import decode_latents
from frostline.models.vae_chunks import VaeDecoderFirst, VaeDecoderNext, decode_in_chunks
from frostline.runtime.stage import Runner, Stage, TensorSpec

from .inputs import StageInputs, tolerance
from .vae_chunks import chunk_networks


def build(inputs: StageInputs) -> Stage:
    """The stage, its torch side `decode_latents`."""
    vae, shapes = inputs.components.vae, inputs.shapes
    modules = tuple(kind(vae).to(inputs.device).eval() for kind in (VaeDecoderFirst, VaeDecoderNext))
    per_block = inputs.components.spatial_multiple // inputs.components.spatial_stride
    channels = vae.model.conv2.in_channels
    height, width = inputs.pixels("height", per_block), inputs.pixels("width", per_block)
    latents = TensorSpec("latents", (shapes.dimension("batch"), channels, 1, height, width), inputs.dtype)

    def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
        return {"video": decode_latents(vae, tensors["latents"])}

    def assemble(runners: Mapping[str, Runner]) -> Runner:
        return lambda **tensors: {"video": decode_in_chunks(runners, tensors["latents"])}

    def sample() -> dict[str, Tensor]:
        batch, _, _, *size = latents.shape_at("opt")
        shape = (batch, channels, shapes.latent_frames[1], *size)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"latents": values.to(inputs.device, inputs.dtype)}

    return Stage(
        name="vae_decoder",
        model=inputs.components.name,
        networks=chunk_networks(inputs, (modules[0], modules[1]), (latents, latents), "video", per_block),
        torch=in_torch,
        assemble=assemble,
        sample=sample,
        tolerance=tolerance("vae_decoder", inputs.dtype),
    )
