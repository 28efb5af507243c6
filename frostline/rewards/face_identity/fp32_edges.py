"""Wrap face networks for use as stages, with fp32 inputs and outputs for weights of any type."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Fp32Edges(nn.Module):
    """Takes and returns fp32, and computes in the type of its weights, so that callers do not depend on that type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.dtype = weights_dtype(module)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the module's outputs in fp32."""
        outputs = self.module(images.to(self.dtype))
        return tuple(output.float() for output in outputs) if isinstance(outputs, tuple) else outputs.float()


def with_fp32_edges(module: nn.Module) -> nn.Module:
    """Return the wrapped module; the module itself if its weights are fp32."""
    return module if weights_dtype(module) == torch.float32 else Fp32Edges(module).eval()


def weights_dtype(module: nn.Module) -> torch.dtype:
    """Return the floating-point type of a module."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
