"""Inputs are checked before an engine sees them: engines themselves answer a wrong shape with noise, or a crash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.stage import Dimension, Network, TensorSpec


def check_inputs(network: Network, inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs that `network` was not compiled for.

    Raises:
        EngineError: names the input and what it must be.
    """
    if unexpected := sorted(inputs.keys() - {spec.name for spec in network.inputs}):
        raise EngineError(f"{network.name} has no input {unexpected[0]}")
    for spec in network.inputs:
        if spec.name not in inputs:
            raise EngineError(f"{network.name} lacks its input {spec.name}")
    _check(network, network.inputs, inputs)


def check_live(network: Network) -> None:
    """The same for the live tensors, whose shapes no optimizer step changes: once is enough."""
    _check(network, network.live_specs, network.live)


def _check(network: Network, specs: Iterable[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for spec in specs:
        tensor, where = tensors[spec.name], f"{network.name}: input {spec.name}"
        if tensor.dtype != spec.dtype:
            raise EngineError(f"{where} is {tensor.dtype}, the engine takes {spec.dtype}")
        if tensor.ndim != len(spec.shape):
            raise EngineError(f"{where} has shape {tuple(tensor.shape)}, the engine takes {_describe(spec)}")
        for extent, expected in zip(tensor.shape, spec.shape, strict=True):
            if not _fits(extent, expected):
                raise EngineError(f"{where} has shape {tuple(tensor.shape)}, the engine takes {_describe(spec)}")
            if isinstance(expected, Dimension):
                count, first = seen.setdefault(expected.name, (extent // expected.multiple, spec.name))
                if count * expected.multiple != extent:
                    raise EngineError(
                        f"{where} has shape {tuple(tensor.shape)}: {expected.name} differs from {first}'s"
                    )


def _fits(extent: int, expected: int | Dimension) -> bool:
    if isinstance(expected, int):
        return extent == expected
    return extent % expected.multiple == 0 and expected.at("min") <= extent <= expected.at("max")


def _describe(spec: TensorSpec) -> str:
    """For instance `(1…32, 3, 32…1024 by 16)`."""
    extents = []
    for extent in spec.shape:
        if isinstance(extent, int):
            extents.append(str(extent))
            continue
        step = f" by {extent.multiple}" if extent.multiple > 1 else ""
        extents.append(f"{extent.at('min')}…{extent.at('max')}{step}")
    return f"({', '.join(extents)})"
