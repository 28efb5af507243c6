"""Decode with the Wan VAE in PyTorch, live or frozen, for any batch, with diffsynth's `WanVideoVAE`.

Shapes are those of the VAE of Wan2.1; for Wan2.2 TI2V, the spatial stride is 16 instead of 8.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from frostline.models.frozen_ops import convolve
from frostline.models.wan.vae_chunks import decode_in_chunks
from frostline.models.wan.vae_decoder_full import decode_chunk, decode_clip

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE


def decode_latents(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """Decode (B, C, F, h, w) normalised latents to a video (B, 3, 4F - 3, 8h, 8w) in [-1, 1].

    With a gradient, all frames are decoded at once (`decode_clip`), which keeps 40 GB of activations for backward
    for 81 frames of 480×480 in bf16 (diffsynth's loop: 154 GB); `train/memory/recompute.py` needs less. Without a
    gradient, frames are decoded chunk by chunk.
    """
    if torch.is_grad_enabled():
        return decode_clip(vae, latents).clamp(-1, 1)
    return decode_in_chunks(decoder_chunks(vae), latents)


def decode_from(vae: WanVideoVAE, latents: Tensor, caches: Mapping[str, Tensor]) -> Tensor:
    """Decode latent frames that are not the first of their clip, all at once, differentiable with respect to them.

    Args:
        latents: (B, C, n, h, w), normalised.
        caches: the caches after the preceding frames, from `decoder_caches`.
    Returns:
        (B, 3, 4n, 8h, 8w) in [-1, 1], equal to this part of the whole decoded clip.
    """
    return decode_chunk(vae, latents, [*caches.values()])[0].clamp(-1, 1)


def decoder_chunks(vae: WanVideoVAE) -> dict[str, Callable[..., dict[str, Tensor]]]:
    """Return the networks `first` and `next` of `decode_in_chunks`, with the operations of the live decoder."""

    def chunk(latents: Tensor, **caches: Tensor) -> dict[str, Tensor]:
        video, *seen = decode_chunk(vae, latents, [*caches.values()])
        return {"video": video.clamp(-1, 1), **{f"next_cache_{index:02d}": cache for index, cache in enumerate(seen)}}

    return {"first": chunk, "next": chunk}


def use_onednn_conv3d(module: nn.Module) -> None:
    """Run every fp32 `Conv3d` in `module` in oneDNN on a CPU, for any batch size.

    At batch size 1, torch uses its own slow path: about five times slower, with results equal within 1e-6.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d):
            convolution._conv_forward = types.MethodType(_onednn_conv3d, convolution)


def _onednn_conv3d(self: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = cast(tuple[int, ...], self.padding)
    return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)
