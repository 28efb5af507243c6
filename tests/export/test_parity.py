"""The comparison of an engine with PyTorch: what passes, what fails, and what is measured."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.export.parity import compare
from frostline.runtime.engines.manifest import Parity
from frostline.runtime.engines.tolerance import Tolerance

TOLERANCE = Tolerance(atol=1e-5, rtol=1e-4, cosine=0.9999)
MEASURES = ("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel")


def measure(expected: Tensor, actual: Tensor | None, tolerance: Tolerance = TOLERANCE) -> Parity:
    outputs = {} if actual is None else {"y": actual}
    (parity,) = compare("net", "opt", {"y": expected}, outputs, tolerance)
    assert (parity.network, parity.case, parity.output) == ("net", "opt", "y")
    return parity


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_equal_tensors_pass(dtype: torch.dtype) -> None:
    x = (10 * noise(2, 3, 4)).to(dtype)
    parity = measure(x, x.clone(), Tolerance(0.0, 0.0, 1 - 1e-12))
    assert parity.passed
    assert [getattr(parity, name) for name in MEASURES] == [0.0] * 6
    assert parity.cosine == pytest.approx(1, abs=1e-12)


def test_zeros_equal_zeros_and_nothing_else() -> None:
    assert measure(torch.zeros(3), torch.zeros(3)).passed
    assert measure(torch.zeros(3), torch.zeros(3)).cosine == 1
    lenient = Tolerance(atol=1.0, rtol=0.0, cosine=0.5)
    assert not measure(torch.zeros(3), torch.full((3,), 1e-3), lenient).passed
    assert not measure(noise(3), torch.zeros(3), Tolerance(atol=10.0, rtol=0.0, cosine=0.5)).passed


@pytest.mark.parametrize(("part_of_bound", "passes"), [(0.99, True), (1.01, False)])
def test_the_bound_is_atol_and_rtol_of_the_largest_value(part_of_bound: float, passes: bool) -> None:
    x = noise(100).double()
    bound = TOLERANCE.atol + TOLERANCE.rtol * x.abs().max()
    for index in (0, int(x.abs().argmin()), 99):
        y = x.clone()
        y[index] += part_of_bound * bound
        parity = measure(x, y)
        assert parity.passed is passes
        assert parity.max_abs == pytest.approx(part_of_bound * bound.item(), rel=1e-6)


def test_the_cosine_decides_where_the_errors_are_small() -> None:
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([1.0, 0.1])
    cosine = 1 / math.sqrt(1.01)
    assert measure(x, y, Tolerance(1.0, 0.0, cosine - 1e-6)).passed
    assert not measure(x, y, Tolerance(1.0, 0.0, cosine + 1e-6)).passed
    assert measure(x, -x, Tolerance(10.0, 0.0, -1.0)).cosine == pytest.approx(-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(bad: float) -> None:
    x = noise(5)
    y = x.clone()
    y[2] = bad
    anything = Tolerance(atol=math.inf, rtol=0.0, cosine=-2.0)
    assert measure(x, 2 * x, anything).passed
    assert not measure(x, y, anything).passed
    assert not measure(y, x).passed
    assert not measure(y, y.clone()).passed, "PyTorch's output is not finite, so nothing is verified"


@pytest.mark.parametrize("actual", [None, noise(3, 2), noise(6), noise(2, 3, 1), noise(0)], ids=str)
def test_another_shape_or_none_fails_with_infinite_error(actual: Tensor | None) -> None:
    parity = measure(noise(2, 3), actual, Tolerance(atol=math.inf, rtol=math.inf, cosine=-1.0))
    assert not parity.passed
    assert {getattr(parity, name) for name in MEASURES} == {math.inf}
    assert parity.cosine == -1


def test_empty_outputs_pass() -> None:
    """An engine that finds no face, and so returns no boxes, agrees with PyTorch."""
    parity = measure(noise(0, 4), noise(0, 4))
    assert parity.passed
    assert {getattr(parity, name) for name in MEASURES} == {0.0}
    assert not measure(noise(0, 4), noise(1, 4)).passed


def test_every_output_is_measured() -> None:
    expected = {"a": noise(4), "b": noise(4, seed=1), "c": noise(4, seed=2)}
    actual = {"a": expected["a"], "b": expected["b"] + 1, "extra": noise(1)}
    measured = compare("net", "min", expected, actual, TOLERANCE)
    assert [(parity.output, parity.passed) for parity in measured] == [("a", True), ("b", False), ("c", False)]


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=300),
    seed=st.integers(0, 99),
    # Smaller errors are subnormal in fp32. Some means flush them to zero, others do not.
    size=st.just(0.0) | st.floats(1e-30, 1),
)
@settings(max_examples=100, deadline=None)
def test_measures_are_what_numpy_says(values: list[float], seed: int, size: float) -> None:
    a = np.array(values, dtype=np.float32)
    b = (a + size * np.random.default_rng(seed).normal(size=a.shape)).astype(np.float32)
    parity = measure(torch.from_numpy(a), torch.from_numpy(b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    error = np.abs(a - b)
    relative = error / max(np.abs(a).max(), np.finfo(np.float32).tiny)
    expected = [f(e) for e in (error, relative) for f in (np.max, np.mean, lambda x: np.quantile(x, 0.99))]
    # Relative errors of an output of zeros overflow in both. Polygraphy computes means in fp32.
    assert [getattr(parity, name) for name in MEASURES] == pytest.approx(expected, rel=1e-6)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms > 0:
        assert parity.cosine == pytest.approx(a @ b / norms, abs=1e-9)


def test_the_quantile_of_more_values_than_torch_takes() -> None:
    x = torch.zeros(2**24 + 5)
    y = x.clone()
    y[: len(y) // 50] = 1.0
    parity = measure(x, y)
    assert (parity.max_abs, parity.p99_abs) == (1.0, 1.0)
    y[len(y) // 200 :] = 0
    assert measure(x, y).p99_abs == 0.0
