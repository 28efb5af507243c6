"""Check inputs before an engine gets them: engines return wrong values or crash if an input is invalid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from frostline.errors import EngineError, InputError, ShapeError
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


def check_inputs(network: Network, inputs: Mapping[str, Tensor]) -> None:
    """Check that engines of `network` support the inputs.

    Raises:
        InputError: an input is invalid; the message names it and the requirement. A ShapeError if its shape is invalid.
    """
    network.check_names(inputs)
    network.check_shapes(inputs)
    _check(network, network.inputs, inputs)


def check_live(network: Network) -> None:
    """Check the live tensors in the same way. An optimizer step changes neither their shapes nor their dtypes.

    Raises:
        EngineError: a shape, dtype or device is not supported, so that every call would fail.
    """
    for spec in network.live_specs:
        if not spec.admits(network.live[spec.name].shape):
            shape, low, high = tuple(network.live[spec.name].shape), spec.shape_at("min"), spec.shape_at("max")
            raise EngineError(f"network {network.name}: {spec.name} has shape {shape}, engines support {low} to {high}")
    _check(network, network.live_specs, network.live)


class LiveCheck:
    """Run `check_live` before each use of an engine, if a live tensor was replaced or moved since the last check.

    One check at the start is not enough, because a training loop may replace the tensors at any time.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._seen: list[tuple[Tensor, int]] = []

    def __call__(self) -> None:
        """Raise an EngineError if the engine does not support the current live tensors."""
        seen = [(tensor, tensor.data_ptr()) for tensor in self._network.live.values()]
        same = len(seen) == len(self._seen) and all(
            tensor is before and address == then
            for (tensor, address), (before, then) in zip(seen, self._seen, strict=True)
        )
        if not same:
            check_live(self._network)
            self._seen = seen


def _check(network: Network, specs: Iterable[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Check dtypes and devices, and that dimensions of the same name have the same size."""
    seen: dict[str, tuple[int, str]] = {}
    device = network.device
    for spec in specs:
        tensor, where = tensors[spec.name], f"network {network.name}: input {spec.name}"
        if tensor.dtype != spec.dtype:
            raise InputError(f"{where} is {tensor.dtype}, the engine requires {spec.dtype}")
        if tensor.device != device:
            raise InputError(f"{where} is on {tensor.device}, the engine is on {device}")
        for extent, expected in zip(tensor.shape, spec.shape, strict=True):
            if not isinstance(expected, Dimension):
                continue
            count, first = seen.setdefault(expected.name, (extent // expected.multiple, spec.name))
            if count * expected.multiple != extent:
                raise ShapeError(
                    f"{where} has shape {tuple(tensor.shape)}: its {expected.name} differs from that of {first}"
                )
