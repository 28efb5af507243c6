"""Restrict the range of shapes of a network to what an engine was built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


def bounded(network: Network, largest: Mapping[str, Sequence[int]]) -> Network:
    """Return `network` with the largest shapes that an engine was built for.

    Args:
        largest: largest shape by input name, including live inputs; other inputs keep the range of the network.
    """
    extents: dict[str, int] = {}
    for spec in (*network.inputs, *network.live_specs):
        for extent, bound in zip(spec.shape, largest.get(spec.name, ()), strict=False):
            if isinstance(extent, Dimension):
                extents[extent.name] = min(extents.get(extent.name, extent.max), bound // extent.multiple)
    return with_largest(network, extents)


def with_largest(network: Network, extents: Mapping[str, int]) -> Network:
    """Return `network` with other upper bounds of its dynamic dimensions.

    Args:
        extents: upper bound by dimension, in units of the dimension; at least the dimension's typical value.
    """
    return replace(
        network,
        inputs=tuple(_lowered(spec, extents) for spec in network.inputs),
        live_specs=tuple(_lowered(spec, extents) for spec in network.live_specs),
    )


def _lowered(spec: TensorSpec, extents: Mapping[str, int]) -> TensorSpec:
    shape = (
        replace(extent, max=extents.get(extent.name, extent.max)) if isinstance(extent, Dimension) else extent
        for extent in spec.shape
    )
    return replace(spec, shape=tuple(shape))
