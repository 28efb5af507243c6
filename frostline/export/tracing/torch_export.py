"""Trace a network to torch's own graph, the first step of every export."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import ExportedProgram

from frostline.errors import EngineError
from frostline.models.quantization.linear import plain_layers
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec

# With dynamic dimensions, creating an entry of this cache takes longer than computing the value.
WITHOUT_FAKE_CACHE = functools.partial(dynamo_config.patch, fake_tensor_cache_enabled=False)


def trace_program(network: Network) -> ExportedProgram:
    """Trace `network` with dynamic dimensions, and with its live tensors as inputs.

    Weights are copied only if they are not dense, or to dequantise them (8-bit and 4-bit weights).

    Raises:
        EngineError: the tracer does not support an operation of the network.
    """
    try:
        with (
            quiet(),
            torch.no_grad(),
            WITHOUT_FAKE_CACHE(),
            fx_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
            # The graph contains the dequantised values that PyTorch computes with.
            plain_layers(network.module),
        ):
            program = torch.export.export(
                _Positional(_dense(network.module)).eval(),
                _samples(network),
                dynamic_shapes=(dynamic_shapes((*network.inputs, *network.live_specs)),),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be traced: {error}") from error
    _drop_asserts(program)
    return program


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """Return the `dynamic_shapes` argument of `torch.export`, per input; equal names share one symbol."""
    symbols: dict[str, Any] = {}

    def symbol(dimension: Dimension) -> Any:
        if dimension.name not in symbols:
            symbols[dimension.name] = torch.export.Dim(dimension.name, min=dimension.min, max=dimension.max)
        base = symbols[dimension.name]
        return base if dimension.multiple == 1 else dimension.multiple * base

    return tuple({axis: symbol(extent) for axis, extent in enumerate(spec.shape) if _is_open(extent)} for spec in specs)


def _dense(module: nn.Module) -> nn.Module:
    """Return the module, or a copy with dense weights if they are not dense.

    With channels-last weights, the tracer treats the sizes of small images as constants.
    """
    if all(tensor.is_contiguous() for tensor in itertools.chain(module.parameters(), module.buffers())):
        return module
    module = copy.deepcopy(module)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data.contiguous()
    return module


def _drop_asserts(program: ExportedProgram) -> None:
    """Remove the tracer's run-time checks.

    The tracer cannot prove that pooling of odd sizes and memory layouts at batch size 1 need no special case, and its
    checks would reject them. Runners check shapes against the range, and parity is measured at its lower end.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress an exporter's output; its errors are exceptions."""
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


def _samples(network: Network) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    specs = (_without_extent_one(spec) for spec in (*network.inputs, *network.live_specs))
    return tuple(spec.sample("opt", generator).to(network.device) for spec in specs)


def _without_extent_one(spec: TensorSpec) -> TensorSpec:
    """Return the spec with typical values of at least 2 for dynamic dimensions: the tracer treats 1 as a constant."""
    shape = (replace(extent, opt=max(extent.opt, 2)) if _is_open(extent) else extent for extent in spec.shape)
    return replace(spec, shape=tuple(shape))


def _is_open(extent: int | Dimension) -> TypeGuard[Dimension]:
    """Return whether a dimension is dynamic; a range of one value is fixed."""
    return isinstance(extent, Dimension) and extent.min < extent.max


class _Positional(nn.Module):
    """Give every network the signature `forward(*inputs)`, so that dynamic shapes have one form."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.module(*inputs)
        # Outputs of engines are dense, so those of the traced network must be as well.
        return outputs.contiguous() if isinstance(outputs, Tensor) else tuple(each.contiguous() for each in outputs)
