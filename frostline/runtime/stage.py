"""Stages, which the runtime runs: their networks, and the specs of their input tensors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from frostline.errors import EngineError, InputError, ShapeError
from frostline.models.lazy_weights import PartWeights
from frostline.runtime.dynamic_dim import Dimension, Size
from frostline.runtime.engines.tolerance import Tolerance

log = logging.getLogger(__name__)

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]
Tensors: TypeAlias = Mapping[str, Tensor]


class Runner(Protocol):
    """Run one network, or a whole stage, on some backend.

    Inputs and outputs are torch tensors on the stage's device. The caller owns the outputs: later calls do not change
    them.
    """

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class TensorSpec:
    """An input of a network: its name, its shape with dynamic dimensions, its dtype, and its sample values."""

    name: str
    shape: tuple[int | Dimension, ...]
    dtype: torch.dtype = torch.float32
    fill: Fill | None = None

    def shape_at(self, size: Size) -> tuple[int, ...]:
        """Return the shape with all dynamic dimensions at their minimum, typical value or maximum."""
        return tuple(d.at(size) if isinstance(d, Dimension) else d for d in self.shape)

    def admits(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape is in the range."""
        return len(shape) == len(self.shape) and all(
            wanted.admits(extent) if isinstance(wanted, Dimension) else wanted == extent
            for wanted, extent in zip(self.shape, shape, strict=True)
        )

    def sample(self, size: Size, generator: torch.Generator) -> Tensor:
        """Return a random tensor of this spec."""
        return self.random(self.shape_at(size), generator)

    def random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return random values for a shape within the spec; standard normal if `fill` is None."""
        values = self.fill(shape, generator) if self.fill else torch.randn(shape, generator=generator)
        return values.to(self.dtype)


class ModuleTensors(Mapping[str, Tensor]):
    """Tensors of a module by name, looked up at each use: a parameter object may be replaced at any time.

    Args:
        module: the module that contains them.
        paths: maps the names used here to names in `module.named_parameters()`.
    """

    def __init__(self, module: nn.Module, paths: Mapping[str, str]) -> None:
        self._module = module
        self._paths = dict(paths)
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self.look_up()

    def look_up(self) -> None:
        """Find the modules that contain the tensors, again after the module tree has changed.

        Raises:
            EngineError: the module that contained a parameter no longer exists.
        """
        for name, path in self._paths.items():
            owner, _, leaf = path.rpartition(".")
            try:
                self._owners[name] = (self._module.get_submodule(owner), leaf)
            except AttributeError as error:
                raise EngineError(f"the module no longer has the parameter {path}") from error

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor.

        Raises:
            EngineError: the parameter no longer exists; for example, `torch.nn.utils.parametrize` replaced it.
        """
        owner, leaf = self._owners[name]
        tensor = owner._parameters.get(leaf)
        if tensor is None:
            raise EngineError(f"the module no longer has the parameter {self._paths[name]}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


@dataclass(frozen=True)
class Network:
    """A graph that a backend compiles.

    Attributes:
        module: takes the inputs as positional arguments, in order, then the live tensors; returns the outputs in order.
        live: tensors of the trainer, by input name, that engines read in place: after an optimizer step, the engine
            uses the new values. `live_specs` contains their dynamic dimensions and random sample values.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    live: Mapping[str, Tensor] = field(default_factory=dict)
    live_specs: tuple[TensorSpec, ...] = ()

    @property
    def weight(self) -> Tensor:
        """Return one of the weights, which determines device and floating-point type."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next(tensor for tensor in tensors if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.weight.device

    def samples(self, size: Size, seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs, without the live ones."""
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: spec.sample(size, generator).to(self.device) for spec in self.inputs}

    def check_names(self, inputs: Mapping[str, Tensor]) -> None:
        """Check the names of the inputs.

        Raises:
            InputError: an input is missing or unknown.
        """
        names = {spec.name for spec in self.inputs}
        if wrong := sorted(inputs.keys() ^ names):
            raise InputError(f"network {self.name} {'lacks its' if wrong[0] in names else 'has no'} input {wrong[0]}")

    def check_shapes(self, inputs: Mapping[str, Tensor]) -> None:
        """Check that the shapes of the inputs are in the range that engines are built for.

        Raises:
            ShapeError: they are not; the message names the input, its shape and the range.
        """
        for spec in self.inputs:
            shape = tuple(inputs[spec.name].shape)
            if not spec.admits(shape):
                raise ShapeError(
                    f"network {self.name}: input {spec.name} has shape {shape}, the engine supports "
                    f"{spec.shape_at('min')} to {spec.shape_at('max')}"
                )

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of PyTorch for `inputs`.

        Raises:
            InputError: an input is missing or unknown.
        """
        self.check_names(inputs)
        positional = [inputs[spec.name] for spec in self.inputs]
        result = self.module(*positional, *self.live.values())
        return dict(zip(self.outputs, result if isinstance(result, tuple) else (result,), strict=True))


class Case(NamedTuple):
    """Inputs of a whole stage, and the variant to compute; see `Stage`."""

    inputs: Tensors
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named computation that any backend may run while it is frozen. This class runs exactly one network.

    A stage with several networks, or with other operations, overrides `torch` and `run`. Stages are data and methods,
    never closures: a deep copy of a module has its own stages, which use its own weights.

    A stage may have named variants: the same weights used in another way, such as a denoiser without its LoRA. The
    variant None is the module as it is.

    Attributes:
        networks: the parts that backends compile.
        tolerance: maximum deviation of an engine's outputs from PyTorch's.
        weights: weights of a stage that is always frozen; they can be released while an engine is used.
        description: inputs and outputs in words, for users of its ONNX files.
        license: SPDX identifier of the weights' licence; None if unknown.
    """

    name: str
    model: str
    networks: tuple[Network, ...]
    tolerance: Tolerance
    weights: PartWeights | None = None
    description: str = ""
    license: str | None = None

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Compute the stage in PyTorch, the reference for engines."""
        return self.networks[0].reference(inputs)

    def run(self, on: Mapping[str, Runner], inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Compute the stage with a runner for each of its networks, by name."""
        return on[self.networks[0].name](**inputs)

    def cases(self) -> Mapping[str, Case]:
        """Return realistic inputs by name, on which engines are compared with PyTorch; the first one is timed."""
        return {"sample": Case(self.networks[0].samples("opt"))}

    def module_state(self) -> ModuleState:
        """Return a function that checks whether engines match module state other than tensors, such as LoRA switches.

        It returns why no engine matches, or None. It is created again when the module tree has changed, and called
        before each use of an engine.
        """
        return _always_as_exported

    def restore_weights(self) -> None:
        """Make sure that PyTorch can compute the stage: its weights may have been released."""
        if self.weights is not None and not self.weights.resident:
            log.info("stage %s: reading its weights", self.name)
            self.weights.restore()


def in_torch(network: Network) -> Runner:
    """Return a runner that computes one network in PyTorch."""
    return lambda **inputs: network.reference(inputs)


ModuleState = Callable[[], str | None]
"""Return why no engine matches the current state of the modules, or None."""


def _always_as_exported() -> None:
    return None
