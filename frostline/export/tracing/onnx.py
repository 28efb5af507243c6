"""Trace a network to an ONNX file."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import Argument
from torch.onnx import ONNXProgram
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
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
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
# What torch.onnx leaves out by itself.
_DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}


def trace_onnx(network: Network, path: Path, opset: int = OPSET) -> None:
    """Write `network` to `path`, its open dimensions dynamic, its live tensors as inputs.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    save_onnx(network, translate(network, trace_program(network), opset), path)


def translate(network: Network, program: ExportedProgram, opset: int) -> ONNXProgram:
    """Translate a program of `trace_program` to ONNX; it shares the weights of the network.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    try:
        one_registry = patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry))
        with quiet(), torch.no_grad(), WITHOUT_FAKE_CACHE(), one_registry:
            translated = torch.onnx.export(
                _decomposed_where_needed(program, opset),
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


def _decomposed_where_needed(program: ExportedProgram, opset: int) -> ExportedProgram:
    """Return a copy that torch.onnx may change, and does not trace again if ONNX has all of its operators.

    To decompose operators, `run_decompositions` traces the whole graph a second time with its open dimensions, which
    takes most of an export. In the networks here there is hardly ever an operator to decompose.
    """
    copied = copy.copy(program)
    copied._graph_module = copy.deepcopy(program.graph_module)
    nodes = [node for node in copied.graph.nodes if node.op == "call_function"]
    for node in nodes:
        _respell(node)
    known = _translated(opset)
    if all(node.target in known and not _changes_its_input(node.target) for node in nodes):
        copied.run_decompositions = lambda *_: copied  # type: ignore[method-assign]
    return copied


_from_torchlib = ONNXRegistry.from_torchlib


@functools.cache
def _registry(opset_version: int) -> ONNXRegistry:
    """Return what torch.onnx fills anew for each export, which takes a second: the translations of all operators.

    An export only reads it; it would add to it for a custom translation, and there is none here.
    """
    return _from_torchlib(opset_version)


@functools.cache
def _translated(opset: int) -> frozenset[Any]:
    """Return the operators that torch.onnx translates or leaves out."""
    return frozenset(get_onnx_implemented_overloads(_registry(max(opset, TORCHLIB_OPSET)))) | _DROPPED


def _respell(node: Node) -> None:
    """Replace an operator that torch.onnx lacks by an equivalent one that it has."""
    if node.target in _CASTS:
        tensor, dtype = _argument(node, "self"), _argument(node, "dtype")
        # Without a type, only the device changes.
        node.target, node.args, node.kwargs = (
            aten._to_copy.default,
            (tensor,),
            {} if dtype is None else {"dtype": dtype},
        )
    elif node.target is aten._upsample_nearest_exact2d.vec:
        factors = cast("list[float] | None", _argument(node, "scale_factors"))
        # At whole factors both variants take the same pixels.
        if factors and all(float(factor).is_integer() for factor in factors):
            node.target = aten.upsample_nearest2d.vec


def _argument(node: Node, name: str) -> Argument:
    """Return an argument of an operator by its name in the schema; None where it is not given."""
    names = [argument.name for argument in cast(OpOverload, node.target)._schema.arguments]
    # Arguments that the schema makes keyword-only come last, so positions and names agree.
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name)


def _changes_its_input(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def save_onnx(network: Network, translated: ONNXProgram, path: Path) -> None:
    """Write the result of `translate`; large weights go to one separate file.

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
