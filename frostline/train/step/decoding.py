"""Decode latents to frames with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.config import GradientCheckpointing
from frostline.runtime.backends import TORCH
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Tensors
from frostline.stages.video_model import Decoder
from frostline.train.memory.recompute import decode_recomputed

# Name of decoding with a gradient in timings.
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
        engine_forward: run the first forward pass of recomputed parts in the runtime; otherwise PyTorch runs both.
        window: the latent frames to decode, by default all. The preceding frames are decoded without a gradient, by the
            planned backend, to obtain the caches of the causal decoder. The frames of the window equal those of the
            whole clip, and their gradient is that of the whole clip with detached caches.
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
        # The stage's own networks are designed for tracing, and slower in PyTorch.
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
    """Convert the VAE's output (B, 3, T, H, W) in [-1, 1] to (B, T, 3, H, W) float32 in [0, 1]."""
    return (video.float().transpose(1, 2) + 1) / 2


@torch.no_grad()
def _caches_before(decoder: Decoder, latents: Tensor, runtime: Runtime) -> Tensors:
    backend, engines = runtime.networks_at(decoder.stage, {"latents": latents})
    with runtime.clock.measure(decoder.stage, backend):
        return decoder.caches(decoder.networks if backend == TORCH else engines, latents)
