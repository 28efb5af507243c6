"""Limit the shapes of engines whose backend does not support tensors above a certain size.

A stage supports a range of shapes. At its maximum, 32 videos of 1024×1024 pixels, the VAE of Wan2.1 has a tensor of

    32 × 96 × 4 × 1024 × 1024 = 12,884,901,888 elements,

96 channels of four frames. Its attention has one head of 384 channels, which no engine fuses, and computes scores of
each of 128×128 positions against each other:

    32 × 1 × 16,384 × 16,384 = 8,589,934,592.

TensorRT supports 2^31 - 1 = 2,147,483,647 elements, so its engines get a smaller range: 5 and 7 videos would fit,
respectively. The sizes inside a network depend on its channels, so every network is run on fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name

from frostline.errors import EngineError
from frostline.runtime.bounds import with_largest
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.stage import Network, Stage

# Dimensions whose default maximum is lowered, in this order, and their lowest maximum (None: the typical value). The
# number of videos is lowered before their size, because training uses few at once. For face detection the size comes
# first, because there are many images: at 1024 pixels, the first network still finds faces of 20 pixels in images of
# 1700 pixels, because it processes them at a scale of 12 / 20.
_LOWERED: tuple[tuple[tuple[str, ...], int | None], ...] = (
    (("face_height", "face_width"), 1024),
    (("batch", "faces", "images"), None),
    (("latent_frames",), None),
    (("height", "width"), None),
    (("face_height", "face_width"), None),
)
# In 16 bits, attention with heads of at most this many channels is one fused kernel without stored scores.
_FUSED_HEAD = 256


@dataclass(frozen=True)
class LargestTensor:
    """The largest tensor of a network: the operation that creates it, and its shape."""

    operation: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.operation} of {' x '.join(f'{extent:,}' for extent in self.shape)} = {self.elements:,} elements"


def within_limit(network: Network, backend: str, limit: int | None, asked: frozenset[str] = frozenset()) -> Network:
    """Return `network` with its maximum shapes lowered until no tensor has more than `limit` elements.

    Args:
        backend: the backend with this limit.
        asked: dimensions that must not be lowered, because the user set their maximum.
    Raises:
        EngineError: a tensor is still too large; the message names the largest one.
    """
    if limit is None:
        return network
    for names, floor in _LOWERED:
        largest = largest_tensor(network)
        if largest.elements <= limit:
            return network
        group = [d for d in _dimensions(network) if d.name in names and d.name not in asked and d.max > d.opt]
        if group:
            network = _lower(network, group, floor, limit)
    largest = largest_tensor(network)
    if largest.elements > limit:
        raise EngineError(
            f"{backend} supports tensors of at most {limit:,} elements, but network {network.name} "
            f"has {largest} at its maximum shapes: lower --max-shapes"
        )
    return network


def check_served(stage: Stage, manifest: Manifest, asked: frozenset[str]) -> None:
    """Check that an existing engine supports the maximum sizes that the user set.

    Args:
        asked: the dimensions whose maximum the user set.
    Raises:
        EngineError: it supports less.
    """
    for lowered in _lowered_inputs(stage, manifest):
        if lowered.dimensions & asked:
            raise EngineError(
                f"the {manifest.backend} engine of {stage.name} supports {lowered}, which is less than "
                "requested, because its tensors would be too large: lower --max-shapes"
            )


def served_note(stage: Stage, manifest: Manifest) -> str:
    """Return a note if an engine supports less than its stage's range of shapes; otherwise an empty string."""
    lowered = _lowered_inputs(stage, manifest)
    return f"limited by the size of its tensors: at most {', '.join(map(str, lowered))}" if lowered else ""


def largest_tensor(network: Network) -> LargestTensor:
    """Return the largest tensor at the maximum shapes, of all inputs, outputs and intermediate results.

    Attention scores count unless they stay inside a fused kernel.
    """
    specs = (*network.inputs, *network.live_specs)
    watch = _LargestOf()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(spec.shape_at("max"), dtype=spec.dtype, device=network.device) for spec in specs]
        for spec, tensor in zip(specs, inputs, strict=True):
            watch.see(f"input {spec.name}", tuple(tensor.shape))
        with watch:
            network.module(*inputs)
    return watch.largest


class _LargestOf(TorchFunctionMode):
    """Record the largest tensor that functions return within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = LargestTensor("nothing", (0,))

    def see(self, operation: str, shape: tuple[int, ...]) -> None:
        if math.prod(shape) > self.largest.elements:
            self.largest = LargestTensor(operation, shape)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._see_scores(*args[:2])
        for tensor in _tensors(result):
            name = resolve_name(func) or getattr(func, "__name__", "a tensor")
            self.see(name.rpartition(".")[2], tuple(tensor.shape))
        return result

    def _see_scores(self, query: Tensor, key: Tensor) -> None:
        """Record the scores of (B, heads, L, channels) against (B, heads, S, channels)."""
        fused = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= _FUSED_HEAD
        if not fused:
            self.see("attention scores", (*query.shape[:-1], key.shape[-2]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _lower(network: Network, group: Sequence[Dimension], floor: int | None, limit: int) -> Network:
    """Return `network` with the largest sizes of `group` that fit, with no dimension below its lower limit."""
    floors = {d.name: min(d.max, max(d.opt, floor or d.opt)) for d in group}

    def at(extent: int) -> Network:
        return with_largest(network, {d.name: max(floors[d.name], min(extent, d.max)) for d in group})

    low, high = min(floors.values()), max(d.max for d in group)
    while low < high:
        middle = (low + high + 1) // 2
        if largest_tensor(at(middle)).elements <= limit:
            low = middle
        else:
            high = middle - 1
    return at(low)


def _dimensions(network: Network) -> list[Dimension]:
    """Return the dynamic dimensions without duplicates."""
    found = {extent.name: extent for spec in network.inputs for extent in spec.shape if isinstance(extent, Dimension)}
    return list(found.values())


@dataclass(frozen=True)
class _LoweredInput:
    """A network input whose maximum shape an engine does not support, because of these dimensions."""

    name: str
    served: tuple[int, ...]
    wanted: tuple[int, ...]
    dimensions: frozenset[str]

    def __str__(self) -> str:
        served, wanted = ("x".join(map(str, shape)) for shape in (self.served, self.wanted))
        return f"{self.name}:{served} instead of {wanted}"


def _lowered_inputs(stage: Stage, manifest: Manifest) -> list[_LoweredInput]:
    """Return the first lowered input of each network; the others depend on the same dimensions."""
    entries = {entry.name: entry for entry in manifest.networks}
    lowered = []
    for network in stage.networks:
        served = {tensor.name: tensor.max for tensor in entries[network.name].inputs} if network.name in entries else {}
        for spec in network.inputs:
            wanted = spec.shape_at("max")
            if len(found := served.get(spec.name, wanted)) == len(wanted) and found != wanted:
                pairs = zip(spec.shape, found, wanted, strict=True)
                names = frozenset(d.name for d, low, high in pairs if isinstance(d, Dimension) and low < high)
                lowered.append(_LoweredInput(spec.name, found, wanted, names))
                break
    return lowered
