"""Inputs are checked before an engine sees them: engines themselves answer a wrong one with noise, or a crash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from frostline.errors import EngineError, InputError, ShapeError
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


def check_inputs(network: Network, inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs that engines of `network` are not compiled for.

    Raises:
        InputError: names the input and what it must be; a ShapeError where it is the shape.
    """
    network.check_names(inputs)
    network.check_shapes(inputs)
    _check(network, network.inputs, inputs)


def check_live(network: Network) -> None:
    """Check the live tensors in the same way. An optimizer step changes neither their shape nor their type.

    Raises:
        EngineError: a shape is out of range; another call would fail as well.
    """
    for spec in network.live_specs:
        if not spec.admits(network.live[spec.name].shape):
            shape, low, high = tuple(network.live[spec.name].shape), spec.shape_at("min"), spec.shape_at("max")
            raise EngineError(f"network {network.name}: {spec.name} has shape {shape}, engines serve {low} to {high}")
    _check(network, network.live_specs, network.live)


class LiveCheck:
    """`check_live` for each use of an engine: the tensors are checked again where one was replaced or moved.

    Checking once is not enough: a training loop may replace the tensors at any time.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._seen: list[tuple[Tensor, int]] = []

    def __call__(self) -> None:
        """Raise an EngineError where engines do not take the live tensors as they are now."""
        seen = [(tensor, tensor.data_ptr()) for tensor in self._network.live.values()]
        same = len(seen) == len(self._seen) and all(
            tensor is before and address == then
            for (tensor, address), (before, then) in zip(seen, self._seen, strict=True)
        )
        if not same:
            check_live(self._network)
            self._seen = seen


def _check(network: Network, specs: Iterable[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Check types and devices, and that dimensions of one name have one extent."""
    seen: dict[str, tuple[int, str]] = {}
    device = network.device
    for spec in specs:
        tensor, where = tensors[spec.name], f"network {network.name}: input {spec.name}"
        if tensor.dtype != spec.dtype:
            raise InputError(f"{where} is {tensor.dtype}, the engine takes {spec.dtype}")
        if tensor.device != device:
            raise InputError(f"{where} is on {tensor.device}, the engine is on {device}")
        for extent, expected in zip(tensor.shape, spec.shape, strict=True):
            if not isinstance(expected, Dimension):
                continue
            count, first = seen.setdefault(expected.name, (extent // expected.multiple, spec.name))
            if count * expected.multiple != extent:
                raise ShapeError(f"{where} has shape {tuple(tensor.shape)}: its {expected.name} is not {first}'s")
