"""How close an engine comes to PyTorch on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frostline.runtime import manifest
from frostline.runtime.stage import Tolerance

# `torch.quantile` takes no more than 2^24 values.
_QUANTILE_LIMIT = 2**24


def compare(
    network: str,
    case: str,
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> list[manifest.Parity]:
    """Measure every output; an output of another shape, or missing, fails with infinite error."""
    return [_compare_output(network, case, name, expected[name], actual.get(name), tolerance) for name in expected]


def _compare_output(
    network: str, case: str, output: str, expected: Tensor, actual: Tensor | None, tolerance: Tolerance
) -> manifest.Parity:
    if actual is None or actual.shape != expected.shape:
        worst = dict.fromkeys(("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel"), float("inf"))
        return manifest.Parity(network=network, case=case, output=output, cosine=-1.0, passed=False, **worst)
    reference, value = expected.double().flatten().cpu(), actual.double().flatten().cpu()
    if reference.numel() == 0:
        best = dict.fromkeys(("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel"), 0.0)
        return manifest.Parity(network=network, case=case, output=output, cosine=1.0, passed=True, **best)
    error = (value - reference).abs()
    # Relative to the output's scale: entries near zero have no meaningful relative error of their own.
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    relative = error / scale
    bound = tolerance.atol + tolerance.rtol * scale
    cosine = _cosine(reference, value)
    return manifest.Parity(
        network=network,
        case=case,
        output=output,
        max_abs=error.max().item(),
        mean_abs=error.mean().item(),
        p99_abs=_p99(error),
        max_rel=relative.max().item(),
        mean_rel=relative.mean().item(),
        p99_rel=_p99(relative),
        cosine=cosine,
        passed=bool(torch.isfinite(value).all() and error.max() <= bound and cosine >= tolerance.cosine),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = a.norm() * b.norm()
    if norms == 0:
        return 1.0 if torch.equal(a, b) else 0.0
    return (a @ b / norms).item()


def _p99(values: Tensor) -> float:
    step = max(1, values.numel() // _QUANTILE_LIMIT + 1)
    return torch.quantile(values[::step], 0.99).item()
