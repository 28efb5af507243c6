"""Linear layers whose frozen weight is stored in 8 or 4 bits."""

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

# A network's layers that are stored in fewer bits are in its blocks: nearly all of its weights. The others (embeddings
# of text and timestep, patches, head) are small, and what they err by reaches every block.
_BLOCKS = "blocks"
# The format, the shape (out, in), and the type that is computed in.
_How = tuple[str, tuple[int, int], torch.dtype]


class QuantisedLinear(nn.Linear):
    """A frozen linear layer; `weight` is dequantised at each access, and what is written to that is lost.

    Args:
        layer: with the weight to store, or on the meta device.
        kind: one of `FORMATS`.
        dtype: of the dequantised weight.

    Attributes:
        codes, scale: what is stored, see `Format`; all tensors of the layer keep their types when it is cast.
        table: what codes stand for; None where they are numbers.
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
        if table is not None and not codes.is_meta:  # what is loaded into it later has no table
            table = table.to(codes.device)
        self.register_buffer("table", table, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), of the type that the layer computes in."""
        return _weight(self.codes, self.scale, self.table, self._how)

    @property
    def _how(self) -> _How:
        return self.kind, (self.out_features, self.in_features), self.compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Compute `F.linear` with the dequantised weight, which is not kept for backward."""
        if not (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, self.weight, self.bias)
        bias = self.bias
        if dtype := autocast_dtype(input.device.type):
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        return _FrozenLinear.apply(input, self.codes, self.scale, bias, self.table, self._how)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return the sizes and how the weight is stored."""
        return f"{super().extra_repr()}, {self.kind}, {self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` must move codes, scales and table, never round them.
        def moved(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(moved, recurse)


def _weight(codes: Tensor, scale: Tensor, table: Tensor | None, how: _How) -> Tensor:
    kind, shape, dtype = how
    return FORMATS[kind].dequantise(codes, scale, shape, table).to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """`F.linear` that keeps the codes for backward, which are in memory anyway, and dequantises them once more."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, table: Tensor | None, how: _How
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        # A few values: what is saved may be moved to main memory.
        ctx.table, ctx.how = table, how
        return F.linear(input, _weight(codes, scale, table, how).to(input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        return gradient.matmul(_weight(codes, scale, ctx.table, ctx.how).to(gradient.dtype)), *5 * [None]


def quantise_layers(network: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Store the linear layers of a network's blocks in fewer bits, in place and one at a time.

    Args:
        network: frozen, without adapters; its weights may be on the meta device, which then stay to be loaded.
        kind: one of `FORMATS`.
        dtype: that the layers compute in.
    Raises:
        ConfigError: it has no such layers.
    """
    paths = [name for name, layer in network.named_modules() if type(layer) is nn.Linear and _in_blocks(name)]
    if not paths:
        raise ConfigError(f"quantization: {type(network).__name__} has no linear layers in blocks that {kind} is for")
    for path in paths:
        _replace(network, path, QuantisedLinear(cast(nn.Linear, network.get_submodule(path)), kind, dtype))


def quantised_layers(network: nn.Module) -> dict[str, QuantisedLinear]:
    """Return the layers that are stored in fewer bits, by their paths."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}


def dequantised_bytes(network: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield what is stored of each quantised layer of a network, and how many bytes it takes dequantised."""
    for layer in quantised_layers(network).values():
        yield layer.codes, layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        yield layer.scale, 0


@contextmanager
def plain_layers(network: nn.Module) -> Iterator[None]:
    """Within the block, ordinary linear layers with the dequantised weights take the place of the quantised ones.

    For tracing: an engine then has the numbers that PyTorch computes with. They take the memory of the whole network,
    for as long as the trace exists.
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
