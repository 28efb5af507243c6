"""The frozen stage `vae_decoder`: normalised latents (B, C, F, H/8, W/8) to video (B, 3, 4F - 3, H, W) in [-1, 1].

For Wan2.2 TI2V, the latents have H/16 and W/16. The stage is used for sampling and validation, and in training for the
first forward pass if backward recomputes the decoder. Two networks, for the first latent frame and for each following
one with caches as tensors, decode videos of any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.models.wan.vae import decode_latents
from frostline.models.wan.vae_chunks import VaeDecoderFirst, VaeDecoderNext, decode_in_chunks
from frostline.runtime.stage import Case, Runner, Stage, Tensors, TensorSpec
from frostline.stages.tolerances import tolerance

from .inputs import StageInputs
from .vae_chunks import chunk_networks, sizes_without_weights

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE


@dataclass(frozen=True, kw_only=True)
class VaeDecoderStage(Stage):
    """A stage with two networks; `decode_latents` is the PyTorch implementation.

    Attributes:
        sample_shape: (B, C, F, H/8, W/8) of the sample.
    """

    vae: WanVideoVAE
    sample_shape: tuple[int, ...]

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Decode a whole clip in PyTorch: `latents` to `video`."""
        return {"video": decode_latents(self.vae, inputs["latents"])}

    def run(self, on: Mapping[str, Runner], inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Decode chunk by chunk with the runners `first` and `next`."""
        return {"video": decode_in_chunks(on, inputs["latents"])}

    def cases(self) -> Mapping[str, Case]:
        """Return random latents."""
        values = torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(0))
        weight = self.networks[0].weight
        return {"sample": Case({"latents": values.to(weight.device, weight.dtype)})}


def build(inputs: StageInputs) -> Stage:
    """Return the stage, for any number of latent frames."""
    vae, shapes = inputs.components.vae, inputs.shapes
    sizes = sizes_without_weights(inputs, vae.model.conv2)
    modules = tuple(kind(vae, sizes).to(inputs.components.device).eval() for kind in (VaeDecoderFirst, VaeDecoderNext))
    per_block = inputs.components.spec.geometry.spatial_multiple // inputs.components.spec.geometry.spatial_stride
    channels = vae.model.conv2.in_channels
    height, width = inputs.pixels("height", per_block), inputs.pixels("width", per_block)
    latents = TensorSpec("latents", (shapes.dimension("batch"), channels, 1, height, width), inputs.components.dtype)

    batch, _, _, *size = latents.shape_at("opt")
    return VaeDecoderStage(
        name="vae_decoder",
        model=inputs.components.name,
        description=(
            "Decode normalised latents to a video, RGB in [-1, 1]: `first` takes the first latent "
            "frame, `next` takes each following one. Pass the `next_cache_*` outputs of a call to "
            "the `cache_*` inputs of the next call."
        ),
        license=inputs.components.license,
        networks=chunk_networks(inputs, (modules[0], modules[1]), (latents, latents), "video", per_block),
        tolerance=tolerance(inputs.components.dtype),
        vae=vae,
        sample_shape=(batch, channels, shapes.latent_frames[1], *size),
    )
