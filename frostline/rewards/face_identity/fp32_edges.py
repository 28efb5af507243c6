"""Face networks as stages use them: fp32 at the edges whatever the weights are."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Fp32Edges(nn.Module):
    """Takes and returns fp32, and computes in the type of its weights: callers need not know which that is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.dtype = weights_dtype(module)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The module's outputs in fp32."""
        outputs = self.module(images.to(self.dtype))
        return tuple(output.float() for output in outputs) if isinstance(outputs, tuple) else outputs.float()


def with_fp32_edges(module: nn.Module) -> nn.Module:
    """The module itself if its weights are fp32."""
    return module if weights_dtype(module) == torch.float32 else Fp32Edges(module).eval()


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point type of a module."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
