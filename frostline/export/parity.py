"""Compare an engine with PyTorch on the same inputs, with Polygraphy's comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frostline.runtime.engines import manifest
from frostline.runtime.engines.tolerance import Tolerance

# `torch.quantile` supports at most 2^24 values.
_QUANTILE_LIMIT = 2**24
_ERRORS = ("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel")


def compare(
    network: str,
    case: str,
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> list[manifest.Parity]:
    """Compare every output; a missing or non-finite output, or one of another shape, fails with an infinite error.

    Args:
        network, case: names of the network and the test case, for the result.
        expected: outputs of PyTorch.
        actual: outputs of the engine.
    """
    return [_compare_output(network, case, name, expected[name], actual.get(name), tolerance) for name in expected]


def _compare_output(
    network: str, case: str, output: str, expected: Tensor, actual: Tensor | None, tolerance: Tolerance
) -> manifest.Parity:
    where = {"network": network, "case": case, "output": output}
    if actual is None or actual.shape != expected.shape or not _finite(expected, actual):
        return manifest.Parity(**where, **dict.fromkeys(_ERRORS, float("inf")), cosine=-1.0, passed=False)
    if expected.numel() == 0:
        return manifest.Parity(**where, **dict.fromkeys(_ERRORS, 0.0), cosine=1.0, passed=True)
    reference, value = expected.double().flatten().cpu(), actual.double().flatten().cpu()
    # Relative to the scale of the output, because relative errors of entries near zero are meaningless.
    scale = max(reference.abs().max().item(), torch.finfo(torch.float32).tiny)
    error, cosine = _polygraphy(reference, value, tolerance.atol + tolerance.rtol * scale, tolerance.cosine)
    p99 = _p99((value - reference).abs())
    return manifest.Parity(
        **where,
        max_abs=error.max_absdiff,
        mean_abs=error.mean_absdiff,
        p99_abs=p99,
        max_rel=error.max_absdiff / scale,
        mean_rel=error.mean_absdiff / scale,
        p99_rel=p99 / scale,
        cosine=cosine.cosine_similarity,
        passed=bool(error and cosine),
    )


def _polygraphy(reference: Tensor, value: Tensor, bound: float, least_cosine: float) -> tuple[Any, Any]:
    """Return Polygraphy's results for the largest error and the cosine similarity; each is true if within its bound."""
    from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    results = [IterationResult({"output": tensor.numpy()}) for tensor in (value, reference)]
    checks = (
        SimpleCompareFunc(atol=bound, rtol=0, check_error_stat="max"),
        CosineSimilarityCompareFunc(cosine_similarity_threshold=least_cosine),
    )
    # Otherwise it prints a report on every output.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        error, cosine = (check(*results)["output"] for check in checks)
    return error, cosine


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _p99(values: Tensor) -> float:
    step = max(1, values.numel() // _QUANTILE_LIMIT + 1)
    return torch.quantile(values[::step], 0.99).item()
