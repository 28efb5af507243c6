"""Annotate an ONNX file with axis names and metadata, and remove information about the machine that wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version

import onnx_ir as ir

from frostline.models.precision import precision_name
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, Stage, TensorSpec

_SYMBOL = re.compile(r"\bs\d+\b")
_MULTIPLE = re.compile(r"(?:(\d+)\*)?(s\d+)")


def name_axes(model: ir.Model, network: Network) -> None:
    """Replace the tracer's names of dynamic axes, such as `s21` and `2*s89`, by those of the network's inputs.

    Equal names mean equal sizes: `height` of a video, `height/8` of its latents.
    """
    dimensions: dict[str, Dimension] = {}
    for value, spec in zip(model.graph.inputs, (*network.inputs, *network.live_specs), strict=True):
        for extent, wanted in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(wanted, Dimension) and (symbol := _SYMBOL.search(str(extent))):
                dimensions[symbol.group()] = wanted
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_named(extent, dimensions) for extent in value.shape])


def _named(extent: int | ir.SymbolicDim, dimensions: Mapping[str, Dimension]) -> int | ir.SymbolicDim:
    if isinstance(extent, int) or extent.value is None:
        return extent
    multiple = _MULTIPLE.fullmatch(extent.value)
    if multiple and multiple[2] in dimensions:
        return ir.SymbolicDim(dimensions[multiple[2]].axis_of(int(multiple[1] or 1)))
    return ir.SymbolicDim(_SYMBOL.sub(lambda symbol: _in_expression(symbol.group(), dimensions), extent.value))


def _in_expression(symbol: str, dimensions: Mapping[str, Dimension]) -> str:
    name = dimensions[symbol].axis_of(1) if symbol in dimensions else symbol
    return f"({name})" if "/" in name else name


def strip_origin(model: ir.Model) -> None:
    """Remove the exporter's notes: source lines, absolute paths, and the traced graph as text.

    Also remove its type annotations of initializers. They are redundant, and onnxruntime's `quantize_dynamic` rejects a
    graph in which they still have the old type.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for initializer in model.graph.initializers.values():
        initializer.metadata_props.clear()
        initializer.shape = initializer.type = None
    for part in (model, model.graph):
        part.metadata_props.clear()
        part.doc_string = None


def describe(model: ir.Model, stage: Stage, network: Network) -> None:
    """Write the producer, the model, its stage and licence, and a description of inputs and outputs."""
    model.producer_name, model.producer_version = "frostline", version("frostline")
    model.graph.name = f"{stage.name}.{network.name}" if network.name != stage.name else stage.name
    model.metadata_props.update(
        {
            "model": stage.model,
            "stage": stage.name,
            "network": network.name,
            "precision": precision_name(network.weight.dtype),
            # ONNX's standard metadata key for the licence of a model.
            "model_license": stage.license or "not stated",
        }
    )
    model.doc_string = "\n".join(
        [
            stage.description,
            "",
            *(f"{spec.name}: {_text(spec)}" for spec in network.inputs),
            *([f"{len(network.live_specs)} matrices of a LoRA, such as {_example(network)}"] if network.live else []),
            f"Returns {', '.join(network.outputs)}.",
        ]
    )


def _example(network: Network) -> str:
    return ", ".join(f"{spec.name}: {_text(spec)}" for spec in network.live_specs[:2])


def _text(spec: TensorSpec) -> str:
    axes = [extent.axis if isinstance(extent, Dimension) else str(extent) for extent in spec.shape]
    return f"{str(spec.dtype).removeprefix('torch.')} ({', '.join(axes)})"


def _values(model: ir.Model) -> list[ir.Value]:
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return [*model.graph.inputs, *(output for node in nodes for output in node.outputs)]
