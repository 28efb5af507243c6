"""Define linear layers whose frozen weight is stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from frostline.errors import ConfigError
from frostline.models.precision import autocast_dtype

from .storage import FORMATS

# Only layers in transformer blocks are quantised, which contain nearly all weights. The other layers (embeddings of
# text, timestep and patches; head) are small, and their errors would affect all blocks.
_BLOCKS = "blocks"
# The format, the shape (out, in), and the dtype of computation.
_How = tuple[str, tuple[int, int], torch.dtype]


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with a quantised weight.

    `weight` is dequantised at each access; writing to it has no effect. Casting the layer does not change the dtypes of
    its tensors.

    Args:
        layer: the layer to quantise; can be on the meta device.
        kind: one of `FORMATS`.
        dtype: the dtype of the dequantised weight.

    Attributes:
        codes: the quantised weight, see `Format`.
        scale: the scales, see `Format`.
        table: lookup table from codes to values; None if the codes are themselves numbers.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    table: Tensor | None

    def __init__(self, layer: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.compute_dtype = kind, dtype
        codes, scale = FORMATS[kind].quantise(layer.weight.detach())
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
        table = FORMATS[kind].table()
        if table is not None and not codes.is_meta:  # checkpoints do not contain the table
            table = table.to(codes.device)
        self.register_buffer("table", table, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the dequantised weight, (out, in), with the dtype of computation."""
        return _weight(self.codes, self.scale, self.table, self._how)

    @property
    def _how(self) -> _How:
        return self.kind, (self.out_features, self.in_features), self.compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Compute `F.linear` with the dequantised weight, which is not saved for backward."""
        if not (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, self.weight, self.bias)
        bias = self.bias
        if dtype := autocast_dtype(input.device.type):
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        return _FrozenLinear.apply(input, self.codes, self.scale, bias, self.table, self._how)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return sizes, format and dtype for `repr`."""
        return f"{super().extra_repr()}, {self.kind}, {self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` must not cast codes, scales and table.
        def moved(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(moved, recurse)


def _weight(codes: Tensor, scale: Tensor, table: Tensor | None, how: _How) -> Tensor:
    kind, shape, dtype = how
    return FORMATS[kind].dequantise(codes, scale, shape, table).to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """Compute `F.linear`, saving only codes and scales for backward, which dequantises them again."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, table: Tensor | None, how: _How
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        # Not saved with `save_for_backward`, whose tensors can be offloaded: the table is small.
        ctx.table, ctx.how = table, how
        return F.linear(input, _weight(codes, scale, table, how).to(input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        return gradient.matmul(_weight(codes, scale, ctx.table, ctx.how).to(gradient.dtype)), *5 * [None]


def quantise_layers(network: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Quantise the linear layers of a network's blocks in place, one at a time.

    Args:
        network: a frozen network without adapters; weights on the meta device can be loaded afterwards.
        kind: one of `FORMATS`.
        dtype: the dtype of computation.
    Raises:
        ConfigError: the network has no linear layers in blocks.
    """
    paths = [name for name, layer in network.named_modules() if type(layer) is nn.Linear and _in_blocks(name)]
    if not paths:
        raise ConfigError(f"quantization: {type(network).__name__} has no linear layers in blocks to store as {kind}")
    for path in paths:
        _replace(network, path, QuantisedLinear(cast(nn.Linear, network.get_submodule(path)), kind, dtype))


def quantised_layers(network: nn.Module) -> dict[str, QuantisedLinear]:
    """Return the quantised layers by path."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}


def dequantised_bytes(network: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the stored parameters of each quantised layer, each with its number of bytes after dequantisation."""
    for layer in quantised_layers(network).values():
        yield layer.codes, layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        yield layer.scale, 0


@contextmanager
def plain_layers(network: nn.Module) -> Iterator[None]:
    """Replace quantised layers by `nn.Linear` layers with the dequantised weights within the block.

    Used for tracing, so that engines contain the same weights that PyTorch uses. The dequantised weights of the whole
    network are in memory as long as the trace exists.
    """
    layers = quantised_layers(network)
    for path, layer in layers.items():
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.bias = layer.bias  # type: ignore[assignment]
        _replace(network, path, plain.train(layer.training))
    try:
        yield
    finally:
        for path, layer in layers.items():
            _replace(network, path, layer)


def _in_blocks(path: str) -> bool:
    return _BLOCKS in path.split(".")


def _replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = layer
