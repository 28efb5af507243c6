"""Networks on the meta device: shapes and dtypes are real, attention is one kernel, and all patches are reverted."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frostline.models import meta_tensors
from frostline.models.meta_tensors import meta_parameters, on_meta
from frostline.train.memory.tracker import MemoryTracker

aten = torch.ops.aten

SHAPES = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((3, 1), (2, 3, 4)), ((2, 1, 4), (2, 3, 1)), ((2, 3), ())]
DTYPES = [torch.float32, torch.bfloat16]
OF_ONE: dict[Any, tuple[Any, ...]] = {
    aten.clamp.default: (0.0,),
    aten.gelu.default: (),
    aten.gt.Scalar: (0.5,),
    aten.mul.Scalar: (2.0,),
    aten.pow.Tensor_Scalar: (2,),
    aten.rsqrt.default: (),
    aten.silu.default: (),
    aten.split.Tensor: (1,),
    aten.t_copy.default: (),
    aten.unbind_copy.int: (),
}
OF_TWO = (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor)


def facts(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype, result.untyped_storage().nbytes()
    return [facts(part) for part in result]


@pytest.mark.parametrize("func", [*OF_ONE, *OF_TWO], ids=str)
def test_operations_have_the_shapes_and_types_of_real_ones_each_time(func: Any) -> None:
    for (shape, other), dtype, other_dtype in itertools.product(SHAPES, DTYPES, DTYPES):
        if len(shape) != 2 and func is aten.t_copy.default:
            continue
        tensors = [torch.rand(shape).to(dtype)]
        if func in OF_TWO:
            tensors.append(torch.rand(other).to(other_dtype))
        expected = facts(func(*tensors, *OF_ONE.get(func, ())))
        with on_meta():
            found = [func(*tensors, *OF_ONE.get(func, ())) for _ in range(3)]
        assert [facts(each) for each in found] == [expected] * 3


def test_each_result_has_a_storage_of_its_own_but_for_views() -> None:
    x = torch.empty(4, 6, device="meta")
    with on_meta():
        results = [aten.mul.Tensor(x, 2.0) for _ in range(3)]
        views = [aten._unsafe_view.default(x, [6, 4]) for _ in range(3)] + [*x.split(2)]
        made = [aten.native_layer_norm.default(x, [6], None, None, 1e-5) for _ in range(2)]
    own = {tensor.untyped_storage()._cdata for tensor in (x, *results, *made[0], *made[1])}
    assert len(own) == 1 + 3 + 6
    assert {tensor.untyped_storage()._cdata for tensor in views} == {x.untyped_storage()._cdata}


def test_numbers_that_are_equal_are_told_apart_by_their_type() -> None:
    x = torch.arange(3)
    with on_meta():
        assert [aten.mul.Tensor(x, factor).dtype for factor in (1, 1.0, True, 1, 1.0)] == [
            *(torch.int64, torch.float32, torch.int64, torch.int64, torch.float32)
        ]


@pytest.mark.parametrize("keep", [False, True])
def test_the_length_of_a_vector(keep: bool) -> None:
    x = torch.rand(2, 3, 4).bfloat16()
    with on_meta():
        found = torch.linalg.vector_norm(x, 2, [1], keep, dtype=torch.float32)
    assert facts(found) == facts(torch.linalg.vector_norm(x, 2, [1], keep, dtype=torch.float32))


def test_integers_and_comparisons_are_left_to_torch() -> None:
    integer, real = torch.arange(3), torch.rand(3)
    with on_meta():
        assert (integer / 2).dtype == torch.float32
        assert (integer * real).dtype == torch.float32
        assert (real > 0.5).dtype == torch.bool


def test_nothing_of_size_is_allocated_and_everything_counts() -> None:
    module = nn.Linear(10, 1_000_000, dtype=torch.float64)
    with on_meta(module), MemoryTracker(module.parameters()) as tracker:
        x = torch.zeros(1_000_000, 10, dtype=torch.float64, device="cpu")
        result = module(x)
        assert result.is_meta
        assert tracker.live == 8 * (10_000_000 + 10**12)


def test_modules_are_put_back_also_after_an_error() -> None:
    module = nn.BatchNorm1d(3)
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()}
    with pytest.raises(ZeroDivisionError), on_meta(module):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        raise ZeroDivisionError
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_makes_no_tensor_of_all_scores(recomputed: bool) -> None:
    own = F.scaled_dot_product_attention
    tokens = 100_000

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    with on_meta(), MemoryTracker([]) as tracker:
        x = torch.empty(1, 2, tokens, 8, requires_grad=True)
        result = checkpoint(attend, x, use_reentrant=False) if recomputed else attend(x)
        assert isinstance(result, Tensor)
        assert result.shape == x.shape
        result.sum().backward()
        assert x.grad is not None
        assert tracker.peak < tokens * tokens
    assert F.scaled_dot_product_attention is own


def test_attention_of_real_tensors_is_torchs_own_meanwhile() -> None:
    x = torch.rand(1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with meta_tensors._fused_attention():
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, is_causal=True), expected)


def test_modules_without_data_draw_no_random_numbers() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with meta_parameters():
        modules = [nn.Embedding(4, 8), nn.Linear(4, 8), nn.Conv2d(3, 4, 2), nn.LayerNorm(3)]
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_a_model_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from frostline.models.checkpoints.loading import check_files, load_components
load_components("tiny", torch.float32)
check_files("tiny")
assert "torch._dynamo" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
