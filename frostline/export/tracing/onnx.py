"""Trace a network to an ONNX file."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.onnx import ONNXProgram
from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
from torch.onnx._internal.exporter._registration import ONNXRegistry

from frostline.errors import EngineError
from frostline.export.tracing.onnx_annotations import name_axes, strip_origin
from frostline.export.tracing.precision_overrides import widen_sensitive
from frostline.export.tracing.torch_export import WITHOUT_FAKE_CACHE, quiet, trace_program
from frostline.runtime.backends.base.options import OPSET
from frostline.runtime.stage import Network

aten = torch.ops.aten
# Larger weights than this cannot be inside the protobuf: they go to `<file>.data`.
_EMBEDDED_BYTES = 1_500_000_000
# Casts, and which of their arguments is the type, unless it is named.
_CASTS: Mapping[Any, int | None] = {aten.to.dtype: 1, aten.to.device: 2, aten.to.dtype_layout: None}
# What torch.onnx leaves out by itself.
_DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}


def trace_onnx(network: Network, path: Path, opset: int = OPSET) -> None:
    """Write `network` to `path`, its open dimensions dynamic, its live tensors as inputs.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    save_onnx(network, translate(network, trace_program(network), opset), path)


def translate(network: Network, program: ExportedProgram, opset: int) -> ONNXProgram:
    """What `trace_program` gave for `network`, in ONNX; it reads the weights where the network has them.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    try:
        with quiet(), torch.no_grad(), WITHOUT_FAKE_CACHE():
            translated = torch.onnx.export(
                _decomposed_where_needed(program),
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in (*network.inputs, *network.live_specs)],
                output_names=list(network.outputs),
            )
            assert translated is not None
            widen_sensitive(translated.model)
            name_axes(translated.model, network)
            strip_origin(translated.model)
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be expressed in ONNX: {error}") from error
    return translated


def _decomposed_where_needed(program: ExportedProgram) -> ExportedProgram:
    """Return a copy that torch.onnx may change, and that it does not trace anew where ONNX has all of its operators.

    To decompose operators, `run_decompositions` traces the whole graph a second time with its open dimensions, which
    takes most of an export. In the networks here there is hardly ever an operator to decompose.
    """
    copied = copy.copy(program)
    copied._graph_module = copy.deepcopy(program.graph_module)
    nodes = [node for node in copied.graph.nodes if node.op == "call_function"]
    for node in nodes:
        _respell(node)
    known = _translated()
    if all(node.target in known and not _changes_its_input(node.target) for node in nodes):
        copied.run_decompositions = lambda *_: copied  # type: ignore[method-assign]
    return copied


@functools.cache
def _translated() -> frozenset[Any]:
    """Return the operators that torch.onnx translates or leaves out; to list them takes a second."""
    return frozenset(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib())) | _DROPPED


def _respell(node: Node) -> None:
    """Give an operator that ONNX has under another name alone that name, where it computes the same."""
    if node.target in _CASTS:
        at = _CASTS[node.target]
        dtype = node.args[at] if at is not None and len(node.args) > at else node.kwargs.get("dtype")
        # Without a type, where it lies alone is changed.
        node.kwargs = {} if dtype is None else {"dtype": dtype}
        node.target, node.args = aten._to_copy.default, node.args[:1]
    elif node.target is aten._upsample_nearest_exact2d.vec and all(
        float(cast(float, factor)).is_integer() for factor in cast("list[float]", node.args[2] or (0.5,))
    ):
        node.target = aten.upsample_nearest2d.vec


def _changes_its_input(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def save_onnx(network: Network, translated: ONNXProgram, path: Path) -> None:
    """Write what `translate` gave, large weights into one file beside it.

    Raises:
        EngineError: the exporter cannot write it.
    """
    weights = sum(tensor.nbytes for tensor in network.module.state_dict().values())
    try:
        with quiet(), torch.no_grad():
            translated.save(path, external_data=weights > _EMBEDDED_BYTES)
    except OSError:
        raise
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be written as ONNX: {error}") from error
