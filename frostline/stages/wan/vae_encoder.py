"""The stage `vae_encoder`: video (B, 3, 4k + 1, H, W) in [-1, 1] to normalised latents (B, C, k + 1, H/8, W/8).

For Wan2.2 TI2V, the latents have H/16 and W/16. Two networks, for the first frame and for each following four frames
with caches as tensors, encode videos of any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.models.wan.vae_chunks import VaeEncoderFirst, VaeEncoderNext, encode_in_chunks
from frostline.models.wan.video_shape import TEMPORAL_STRIDE
from frostline.runtime.stage import Case, Runner, Stage, Tensors, TensorSpec
from frostline.stages.tolerances import tolerance

from .inputs import StageInputs
from .vae_chunks import chunk_networks, sizes_without_weights

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE


@dataclass(frozen=True, kw_only=True)
class VaeEncoderStage(Stage):
    """A stage with two networks; diffsynth's `encode` is the PyTorch implementation.

    Attributes:
        sample_shape: (B, 3, T, H, W) of the sample.
    """

    vae: WanVideoVAE
    sample_shape: tuple[int, ...]

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Encode a whole video in PyTorch: `video` to `latents`."""
        return {"latents": self.vae.model.encode(inputs["video"], self.vae.scale)}

    def run(self, on: Mapping[str, Runner], inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Encode chunk by chunk with the runners `first` and `next`."""
        return {"latents": encode_in_chunks(on, inputs["video"])}

    def cases(self) -> Mapping[str, Case]:
        """Return a video of random pixels."""
        clip = 2 * torch.rand(self.sample_shape, generator=torch.Generator().manual_seed(0)) - 1
        weight = self.networks[0].weight
        return {"sample": Case({"video": clip.to(weight.device, weight.dtype)})}


def build(inputs: StageInputs) -> Stage:
    """Return the stage, for any number of frames."""
    vae, shapes = inputs.components.vae, inputs.shapes
    sizes = sizes_without_weights(inputs, vae.model.conv1)
    modules = tuple(kind(vae, sizes).to(inputs.components.device).eval() for kind in (VaeEncoderFirst, VaeEncoderNext))
    batch, height, width = shapes.dimension("batch"), inputs.pixels("height"), inputs.pixels("width")
    first, following = (
        TensorSpec("video", (batch, 3, frames, height, width), inputs.components.dtype)
        for frames in (1, TEMPORAL_STRIDE)
    )

    frames = TEMPORAL_STRIDE * (shapes.latent_frames[1] - 1) + 1
    multiple = inputs.components.spec.geometry.spatial_multiple
    return VaeEncoderStage(
        name="vae_encoder",
        model=inputs.components.name,
        description=(
            "Encode a video, RGB in [-1, 1], to normalised latents: `first` takes the first frame, "
            "`next` takes each following four frames. Pass the `next_cache_*` outputs of a call to "
            "the `cache_*` inputs of the next call."
        ),
        license=inputs.components.license,
        networks=chunk_networks(
            inputs,
            (modules[0], modules[1]),
            (first, following),
            "latents",
            multiple,
        ),
        tolerance=tolerance(inputs.components.dtype),
        weights=inputs.components.weights.get("vae_encoder"),
        vae=vae,
        sample_shape=(shapes.batch[1], 3, frames, shapes.height[1], shapes.width[1]),
    )
