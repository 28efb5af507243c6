"""`vae_encoder`: video (B, 3, 4k + 1, H, W) in [-1, 1] to normalised latents (B, C, k + 1, H/8, W/8).

Two networks, the first frame and the next four with their caches as tensors, serve a video of any length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frostline.models.vae import TEMPORAL_STRIDE, VaeEncoderFirst, VaeEncoderNext, encode_video
from frostline.runtime.stage import Network, Runner, Stage, TensorSpec

from .inputs import StageInputs, tolerance


def build(inputs: StageInputs) -> Stage:
    """The stage, its torch side diffsynth's own `encode`."""
    vae, shapes = inputs.components.vae, inputs.shapes
    first = VaeEncoderFirst(vae).to(inputs.device).eval()
    following = VaeEncoderNext(vae).to(inputs.device).eval()
    batch, height, width = shapes.dimension("batch"), inputs.pixels("height"), inputs.pixels("width")
    caches = tuple(
        TensorSpec(
            f"cache_{index:02d}",
            (batch, channels, frames, inputs.pixels("height", per_block), inputs.pixels("width", per_block)),
            inputs.dtype,
        )
        for index, (channels, frames, per_block) in enumerate(_caches(first, inputs))
    )
    # In a graph, an input and an output cannot share a name.
    outputs = ("latents", *(f"next_{cache.name}" for cache in caches))

    def video(frames: int) -> TensorSpec:
        return TensorSpec("video", (batch, 3, frames, height, width), inputs.dtype)

    def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
        return {"latents": vae.model.encode(tensors["video"], vae.scale)}

    def assemble(runners: Mapping[str, Runner]) -> Runner:
        def encode(**tensors: Tensor) -> dict[str, Tensor]:
            return {"latents": encode_video(runners, tensors["video"])}

        return encode

    def sample() -> dict[str, Tensor]:
        frames = TEMPORAL_STRIDE * (shapes.latent_frames[1] - 1) + 1
        shape = (shapes.batch[1], 3, frames, shapes.height[1], shapes.width[1])
        clip = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
        return {"video": clip.to(inputs.device, inputs.dtype)}

    return Stage(
        name="vae_encoder",
        model=inputs.components.name,
        networks=(
            Network("first", first, (video(1),), outputs),
            Network("next", following, (video(TEMPORAL_STRIDE), *caches), outputs),
        ),
        torch=in_torch,
        assemble=assemble,
        sample=sample,
        tolerance=tolerance("vae_encoder", inputs.dtype),
        weights=inputs.components.weights.get("vae_encoder"),
    )


@torch.no_grad()
def _caches(first: VaeEncoderFirst, inputs: StageInputs) -> list[tuple[int, int, int]]:
    """Channels, frames, and entries for every `spatial_multiple` pixels, of each cache tensor."""
    multiple = inputs.components.spatial_multiple
    side = 2 * multiple
    _, *caches = first(torch.zeros(1, 3, 1, side, side, device=inputs.device, dtype=inputs.dtype))
    return [(cache.shape[1], cache.shape[2], cache.shape[3] * multiple // side) for cache in caches]
