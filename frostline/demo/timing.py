"""Compare the duration of steps with engines and in PyTorch, measured alternately in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from frostline.runtime.backends import TORCH
from frostline.train.step.module import TrainingModule

_CONTENDERS = ("cached", "uncached", "torch")


@dataclass(frozen=True)
class Timing:
    """Median durations in milliseconds.

    Attributes:
        step_ms: forward and backward, by contender: `cached`, `uncached` or `torch`.
        stage_ms: latency of each stage, by contender and stage.
    """

    step_ms: dict[str, float]
    stage_ms: dict[str, dict[str, float]]


def time_steps(module: TrainingModule, batch: Mapping[str, Any], rounds: int) -> Timing:
    """Time steps on one batch: the plan with and without cached frozen outputs, and torch without cache.

    The first round is a warm-up and is not counted.

    Args:
        module: the training module.
        batch: the batch of all steps.
        rounds: the number of measured rounds.
    """
    steps: dict[str, list[float]] = {name: [] for name in _CONTENDERS}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in _CONTENDERS}
    for round_number in range(rounds + 1):
        for contender in _CONTENDERS:
            clock = module.runtime.clock
            with _playing(module, contender), clock.collect() as times:
                start = time.perf_counter()
                loss, _, _ = module(batch)
                with clock.measure("backward", TORCH):
                    loss.backward()
                elapsed = 1000 * (time.perf_counter() - start)
            module.zero_grad()
            if round_number == 0:
                continue
            steps[contender].append(elapsed)
            stages[contender].append({name: span.milliseconds for name, span in times.read().items()})
    return Timing(
        {name: statistics.median(samples) for name, samples in steps.items()},
        {name: _medians(samples) for name, samples in stages.items()},
    )


@contextmanager
def _playing(module: TrainingModule, contender: str) -> Iterator[None]:
    """Set the cache and the backends of the module to those of a contender within the block."""
    cache = module.conditioner.cache
    if contender != "cached":
        module.conditioner.cache = None
    backends = dict.fromkeys(module.stages, TORCH) if contender == "torch" else {}
    try:
        with module.runtime.use(**backends):
            yield
    finally:
        module.conditioner.cache = cache


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    names = {name: None for sample in samples for name in sample}
    return {name: statistics.median(sample.get(name, 0.0) for sample in samples) for name in names}
