"""Translate programs to ONNX without redundant work of torch.onnx and onnxscript.

`shortcuts` leaves the file unchanged, byte for byte; operators that `decomposed_where_needed` replaces compute the same
values: see `tests/export/tracing/test_onnx_shortcuts.py`.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from onnx_ir import Node as OnnxNode
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import Argument
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
_IN_PLACE: dict[object, OpOverload] = {
    aten.relu_.default: aten.relu.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
}
# Operators that torch.onnx omits.
_DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}


@contextmanager
def shortcuts() -> Iterator[None]:
    """Apply all shortcuts within the block."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry)))
        stack.enter_context(patch.object(_TypePromotionInterpreter, "run_node", _promote))
        stack.enter_context(patch.object(SimplePatternMatcher, "match", _match))
        yield


def decomposed_where_needed(program: ExportedProgram, opset: int) -> ExportedProgram:
    """Return a copy that torch.onnx may change, and decomposes only if it cannot translate one of the operators.

    To decompose operators, `run_decompositions` traces the whole graph a second time with its dynamic dimensions, which
    takes most of an export. frostline's networks rarely contain an operator to decompose.
    """
    copied = copy.copy(program)
    copied._graph_module = copy.deepcopy(program.graph_module)
    for node in _calls(copied):
        _respell(node)
    known = _translated(opset)
    if all(node.target in known and not _changes_its_input(node.target) for node in _calls(copied)):
        copied.run_decompositions = lambda *_: copied  # type: ignore[method-assign]
    return copied


def _calls(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


_from_torchlib = ONNXRegistry.from_torchlib
_run_node = _TypePromotionInterpreter.run_node
_match_anywhere = SimplePatternMatcher.match


@functools.cache
def _registry(opset_version: int) -> ONNXRegistry:
    """Return torch.onnx's registry of operator translations, cached: creating it takes a second for each export.

    An export only reads it; it would only be modified for custom translations, which are not used here.
    """
    return _from_torchlib(opset_version)


@functools.cache
def _translated(opset: int) -> frozenset[Any]:
    """Return the operators that torch.onnx translates or omits."""
    return frozenset(get_onnx_implemented_overloads(_registry(max(opset, TORCHLIB_OPSET)))) | _DROPPED


def _respell(node: Node) -> None:
    """Replace an operator that torch.onnx lacks by an equivalent one, as its decompositions do."""
    if node.target in _CASTS:
        tensor, dtype = _argument(node, "self"), _argument(node, "dtype")
        # Without a dtype, only the device changes.
        node.target, node.args, node.kwargs = (
            aten._to_copy.default,
            (tensor,),
            {} if dtype is None else {"dtype": dtype},
        )
    elif node.target is aten._upsample_nearest_exact2d.vec:
        factors = cast("list[float] | None", _argument(node, "scale_factors"))
        # At integer factors, both variants select the same pixels.
        if factors and all(float(factor).is_integer() for factor in factors):
            node.target = aten.upsample_nearest2d.vec
    elif node.target in _IN_PLACE:
        if _only_reader(node):
            node.target = _IN_PLACE[node.target]
    elif node.target is aten.min.other:
        node.target = aten.minimum.default
    elif node.target is aten.rsub.Scalar:
        if _argument(node, "alpha") in (None, 1):
            node.target, node.args = aten.sub.Tensor, (_argument(node, "other"), _argument(node, "self"))
            node.kwargs = {}
    elif node.target is aten.adaptive_avg_pool2d.default:
        if _argument(node, "output_size") == [1, 1]:
            node.target, node.args = aten.mean.dim, (_argument(node, "self"), [-1, -2], True)
    elif node.target is aten.batch_norm.default and _argument(node, "training") is False:
        _respell_batch_norm(node)


def _only_reader(node: Node) -> bool:
    """Return whether an in-place operator can be replaced: only `node` uses its first input, and all types
    except bool are equal.

    The input must be a newly allocated tensor, because a view shares the memory of another tensor.
    """
    changed = node.all_input_nodes[0]
    types = {each.meta["val"].dtype for each in (node, *node.all_input_nodes) if each.meta["val"].dtype != torch.bool}
    return (
        isinstance(changed.target, OpOverload)
        and not any(result.alias_info for result in changed.target._schema.returns)
        and list(changed.users) == [node]
        and len(types) == 1
    )


def _respell_batch_norm(node: Node) -> None:
    """Replace a batch normalisation with running statistics by its variant with three results, as in ONNX."""
    names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    with node.graph.inserting_before(node):
        normalised = node.graph.call_function(
            aten._native_batch_norm_legit_no_training.default, tuple(_argument(node, name) for name in names)
        )
    empty = node.meta["val"].new_empty(0)
    normalised.meta = {**node.meta, "val": (node.meta["val"], empty, empty)}
    node.target, node.args, node.kwargs = operator.getitem, (normalised, 0), {}


def _argument(node: Node, name: str) -> Argument:
    """Return an argument of an operator by its name in the schema; None if it is not given."""
    names = [argument.name for argument in cast(OpOverload, node.target)._schema.arguments]
    # Keyword-only arguments come last in the schema, so positions and names agree.
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name)


def _changes_its_input(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _promote(self: _TypePromotionInterpreter, node: Node) -> Any:
    """Make the type promotion of an operator explicit, and compute its result again only if this changed
    the operator.

    torch.onnx computes the whole graph again with dynamic dimensions, although the results are already in the graph. A
    promotion does not change the type of the result, so the following results stay valid.
    """
    if node.op != "call_function" or "val" not in node.meta:
        return _run_node(self, node)
    rule = get_type_promotion_rule(node, self.type_promotion_table)
    if rule is None:
        return node.meta["val"]
    before = node.target, node.args, node.kwargs
    with self._set_current_node(node):
        self._maybe_promote_node(node, rule)
    if (node.target, node.args, node.kwargs) == before:
        return node.meta["val"]
    return super(_TypePromotionInterpreter, self).run_node(node)


def _match(self: SimplePatternMatcher, model: Any, graph: Any, node: OnnxNode, **options: Any) -> MatchResult:
    """Match a pattern that ends at `node`, unless the operator of the node already excludes a match.

    For a pattern with several results, onnxscript otherwise tries all combinations of nodes for each node of the graph:
    the time grows with the square of the number of layers.
    """
    last = self.pattern.output_nodes[0].op_identifier()
    if last is not None and last[1] != node.op_type:
        return MatchResult().fail("The operator differs.")
    return _match_anywhere(self, model, graph, node, **options)
