"""Decoding with a gradient, the bytes that autograd keeps for it, and diffsynth's own decode as the baseline."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.train.memory.tracker import MemoryTracker, tensors_of


def decoded_with_gradient(decoder: Any, frames: int, decode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
    """Return the video, the gradient of the latents, and the bytes that are kept between forward and backward."""
    values = torch.randn(2, len(decoder.scale[0]), frames, 4, 6, generator=torch.Generator().manual_seed(frames))
    latents = values.requires_grad_()
    with MemoryTracker([*tensors_of(decoder.model), latents]) as tracker:
        video = decode(latents)
        kept = tracker.live
    (video * torch.linspace(0, 1, video.shape[-1])).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0
    return video.detach(), latents.grad, kept


def diffsynths(decoder: Any) -> Callable[[Tensor], Tensor]:
    def decode(latents: Tensor) -> Tensor:
        video = decoder.model.decode(latents, decoder.scale)
        decoder.model.clear_cache()
        return video.clamp(-1, 1)

    return decode
