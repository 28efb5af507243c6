"""What the runtime serves: stages, the networks they are made of, and the tensors that go in and out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from frostline.errors import ShapeError
from frostline.models.weights import PartWeights
from frostline.runtime.dimension import Dimension, Size

log = logging.getLogger(__name__)

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]


class Runner(Protocol):
    """Runs one network, or a whole stage, on some backend.

    Tensors in and out are torch's, on the stage's device. Outputs belong to the caller: no later call changes them.
    """

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class TensorSpec:
    """One input of a network: its name, its shape with open dimensions, its dtype, and what a sample looks like."""

    name: str
    shape: tuple[int | Dimension, ...]
    dtype: torch.dtype = torch.float32
    fill: Fill | None = None

    def shape_at(self, size: Size) -> tuple[int, ...]:
        """The shape with all open dimensions at their smallest, typical or largest extent."""
        return tuple(d.at(size) if isinstance(d, Dimension) else d for d in self.shape)

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is in the range."""
        return len(shape) == len(self.shape) and all(
            wanted.admits(extent) if isinstance(wanted, Dimension) else wanted == extent
            for wanted, extent in zip(self.shape, shape, strict=True)
        )

    def sample(self, size: Size, generator: torch.Generator) -> Tensor:
        """A random tensor of this spec."""
        return self.random(self.shape_at(size), generator)

    def random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Random values of a shape that the spec admits; standard normal where `fill` says nothing."""
        values = self.fill(shape, generator) if self.fill else torch.randn(shape, generator=generator)
        return values.to(self.dtype)


@dataclass(frozen=True)
class Network:
    """One graph that a backend compiles.

    module: takes the inputs positionally, in order, then the live tensors; returns the outputs in order.
    live: tensors of the trainer, by input name, that engines read in place: after an optimizer step the engine
        computes with the new values. Their open dimensions, and random values that show, are in `live_specs`.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    live: Mapping[str, Tensor] = field(default_factory=dict)
    live_specs: tuple[TensorSpec, ...] = ()

    @property
    def weight(self) -> Tensor:
        """One of the weights, to tell device and floating-point type by."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next(tensor for tensor in tensors if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight.device

    def samples(self, size: Size, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs, without the live ones."""
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: spec.sample(size, generator).to(self.device) for spec in self.inputs}

    def check_shapes(self, inputs: Mapping[str, Tensor]) -> None:
        """Hold the inputs against the range that engines are built for.

        Raises:
            ShapeError: names the input, its shape and the range.
        """
        for spec in self.inputs:
            shape = tuple(inputs[spec.name].shape)
            if not spec.admits(shape):
                raise ShapeError(
                    f"network {self.name}: input {spec.name} has shape {shape}, the engine serves "
                    f"{spec.shape_at('min')} to {spec.shape_at('max')}"
                )

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PyTorch computes on the same inputs."""
        positional = [inputs[spec.name] for spec in self.inputs]
        result = self.module(*positional, *self.live.values())
        return dict(zip(self.outputs, result if isinstance(result, tuple) else (result,), strict=True))


@dataclass(frozen=True)
class Stage:
    """A named computation that any backend may serve while it is frozen.

    torch: the stage in plain PyTorch, the measure of all engines.
    assemble: makes the stage from one runner per network.
    sample: realistic inputs of the whole stage, for parity and latency.
    base_sample: the same, told to leave the live tensors out (a LoRA scale of 0); None where there are none.
    weights: of a stage that is always frozen, its weights, which need not be in memory while an engine serves it.
    """

    name: str
    model: str
    networks: tuple[Network, ...]
    torch: Runner
    assemble: Callable[[Mapping[str, Runner]], Runner]
    sample: Callable[[], dict[str, Tensor]]
    tolerance: Tolerance
    weights: PartWeights | None = None
    base_sample: Callable[[], dict[str, Tensor]] | None = None

    def restore_weights(self) -> None:
        """Make sure that PyTorch can compute the stage: its weights may be away."""
        if self.weights is not None and not self.weights.resident:
            log.info("stage %s: reading its weights", self.name)
            self.weights.restore()


@dataclass(frozen=True)
class Tolerance:
    """An output passes if `|engine - torch| <= atol + rtol * max|torch|` everywhere and the cosine is high enough."""

    atol: float
    rtol: float
    cosine: float
