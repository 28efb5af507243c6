"""Trace a network to an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.runtime.stage import Dimension, Network, TensorSpec

# The fastest on ONNX Runtime's CPU provider, and every TensorRT builds it.
OPSET = 20
# Larger weights than this cannot be inside the protobuf: they go to `<file>.data`.
_EMBEDDED_BYTES = 1_500_000_000


def trace_onnx(network: Network, path: Path, opset: int = OPSET) -> None:
    """Write `network` to `path`, its open dimensions dynamic, its live tensors as inputs.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    specs = (*network.inputs, *network.live_specs)
    samples = (*network.samples("opt").values(), *(tensor.detach().clone() for tensor in network.live.values()))
    weights = sum(tensor.nbytes for tensor in network.module.state_dict().values())
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Positional(network.module).eval(),
                samples,
                str(path),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in specs],
                output_names=list(network.outputs),
                dynamic_shapes=(dynamic_shapes(specs),),
                external_data=weights > _EMBEDDED_BYTES,
            )
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be traced to ONNX: {error}") from error


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """What `torch.export` wants to know of the open dimensions, per input; equal names share one symbol."""
    symbols: dict[str, Any] = {}

    def symbol(dimension: Dimension) -> Any:
        if dimension.name not in symbols:
            symbols[dimension.name] = torch.export.Dim(dimension.name, min=dimension.min, max=dimension.max)
        base = symbols[dimension.name]
        return base if dimension.multiple == 1 else dimension.multiple * base

    return tuple(
        {axis: symbol(extent) for axis, extent in enumerate(spec.shape) if isinstance(extent, Dimension)}
        for spec in specs
    )


class _Positional(nn.Module):
    """Gives every network one signature, `forward(*inputs)`, so that dynamic shapes are given in one way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter; its errors are exceptions."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
