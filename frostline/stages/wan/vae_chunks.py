"""Shared code of `vae_encoder` and `vae_decoder`: two networks that pass their caches from call to call as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from frostline.models.wan.vae_chunks import VaeDecoderFirst, VaeEncoderFirst
from frostline.runtime.stage import Network, TensorSpec

from .inputs import StageInputs

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE


def sizes_without_weights(inputs: StageInputs, layer: nn.Conv3d) -> WanVideoVAE | None:
    """Return the VAE on the meta device if the weights of one half are not in memory; otherwise None.

    Args:
        layer: a layer of that half.
    """
    if layer.weight.numel():
        return None
    sizes: Any = inputs.components.spec.build("vae")
    sizes.scale = [statistics.to("meta") for statistics in sizes.scale]
    return sizes


def chunk_networks(
    inputs: StageInputs,
    modules: tuple[VaeEncoderFirst | VaeDecoderFirst, VaeEncoderFirst | VaeDecoderFirst],
    chunks: tuple[TensorSpec, TensorSpec],
    gives: str,
    chunk_entries: int,
) -> tuple[Network, Network]:
    """Return the networks `first` and `next`.

    Args:
        modules: for the first chunk and for the following chunks.
        chunks: the inputs of each, without the caches.
        gives: name of the output that is not a cache.
        chunk_entries: number of entries in the height of a chunk for every `spatial_multiple` pixels of height.
    """
    caches = tuple(
        TensorSpec(
            f"cache_{index:02d}",
            (
                inputs.shapes.dimension("batch"),
                channels,
                frames,
                inputs.pixels("height", round(per_entry * chunk_entries)),
                inputs.pixels("width", round(per_entry * chunk_entries)),
            ),
            inputs.components.dtype,
        )
        for index, (channels, frames, per_entry) in enumerate(modules[0].cache_shapes)
    )
    # In a graph, an input and an output cannot share a name.
    outputs = (gives, *(f"next_{cache.name}" for cache in caches))
    return (
        Network("first", modules[0], (chunks[0],), outputs),
        Network("next", modules[1], (chunks[1], *caches), outputs),
    )
