"""From latents to frames, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.config import GradientCheckpointing
from frostline.runtime.backends import TORCH
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Tensors
from frostline.stages.video_model import Decoder
from frostline.train.memory.recompute import decode_recomputed

# What the clock calls decoding with a gradient.
_DECODE = "vae_decoder_live"


def decode_live(
    decoder: Decoder,
    latents: Tensor,
    runtime: Runtime,
    how: GradientCheckpointing | None,
    engine_forward: bool,
    window: slice = slice(None),
) -> Tensor:
    """Decode (B, C, F, h, w) latents to (B, T, 3, H, W) float32 frames in [0, 1], with graph.

    Args:
        how: what backward recomputes.
        engine_forward: let the runtime serve what is recomputed; else PyTorch does both.
        window: the latent frames to decode, by default all. The frames before them are decoded without gradient, by
            the backend that the plan names, for the caches of the causal decoder alone: the frames of the window are
            those of the whole clip, and their gradient is that of the whole clip with these caches detached.
    """
    first, end, _ = window.indices(latents.shape[2])
    latents = latents[:, :, :end].to(decoder.dtype)
    caches = _caches_before(decoder, latents[:, :, :first].detach(), runtime) if first else None
    latents = latents[:, :, first:]
    if how in (None, "none") or not torch.is_grad_enabled():
        with runtime.clock.measure(_DECODE, TORCH):
            return to_frames(decoder.whole(latents) if caches is None else decoder.go_on(latents, caches))
    forward = recompute = decoder.networks
    backend = TORCH
    if engine_forward:
        backend, engines = runtime.networks_at(decoder.stage, {"latents": latents.detach()})
        # The stage's own networks in PyTorch are made to be traced, and slower.
        forward = recompute if backend == TORCH else engines
    with runtime.clock.measure(_DECODE, backend):
        video = decode_recomputed(
            lambda networks, latents: decoder.assemble(networks, latents, caches),
            forward,
            recompute,
            latents,
            whole=how == "full",
        )
    return to_frames(video)


def to_frames(video: Tensor) -> Tensor:
    """(B, T, 3, H, W) float32 in [0, 1] of what the VAE gives, (B, 3, T, H, W) in [-1, 1]."""
    return (video.float().transpose(1, 2) + 1) / 2


@torch.no_grad()
def _caches_before(decoder: Decoder, latents: Tensor, runtime: Runtime) -> Tensors:
    backend, engines = runtime.networks_at(decoder.stage, {"latents": latents})
    with runtime.clock.measure(decoder.stage, backend):
        return decoder.caches(decoder.networks if backend == TORCH else engines, latents)
