"""Run the sensitive operations of an fp16 or bf16 graph in fp32: sums over many values, and exponentials.

PyTorch's kernels accumulate in fp32 for every input type. In an fp16 ONNX graph, accumulation is left to the engine: a
softmax loses its small weights, and a sum of squares overflows at 65504. Casts make fp32 explicit. RoPE, RMS norm and
the timestep sinusoid already use fp32 in the modules.
"""

from __future__ import annotations

import onnx_ir as ir

_SENSITIVE = frozenset(
    (
        "Softmax",
        "LogSoftmax",
        "LayerNormalization",
        "RMSNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "ReduceL2",
        "ReduceMean",
        "ReduceSum",
    )
)
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def widen_sensitive(model: ir.Model) -> None:
    """Wrap every sensitive operation of a 16-bit type in casts to fp32 and back."""
    for node in list(model.graph):
        dtype = node.inputs[0].dtype if node.op_type in _SENSITIVE and node.inputs[0] else None
        if dtype is not None and dtype in _NARROW:
            _widen(model.graph, node, dtype)


def _widen(graph: ir.Graph, node: ir.Node, narrow: ir.DataType) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in _NARROW:
            cast = _cast(value, ir.DataType.FLOAT, f"{node.name}_input_{index}")
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    output = node.outputs[0]
    back = _cast(output, narrow, f"{node.name}_output")
    graph.insert_after(node, back)
    narrowed = back.outputs[0]
    for user, index in list(output.uses()):
        if user is not back:
            user.replace_input_with(index, narrowed)
    if output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = narrowed
        narrowed.name, output.name = output.name, f"{output.name}_fp32"
    output.dtype = ir.DataType.FLOAT


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{name}_cast")
    node.outputs[0].name = f"{name}_cast"
    node.outputs[0].shape = value.shape
    node.outputs[0].dtype = dtype
    return node
