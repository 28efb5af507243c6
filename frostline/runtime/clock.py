"""Milliseconds per stage and backend, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True)
class StageTime:
    """Time spent in one stage since the clock was last read. `calls` frozen or live uses, on `backend`."""

    backend: str
    milliseconds: float
    calls: int


class StageClock:
    """Collects the time of each use of a stage until `read`."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str], list[_Span]] = defaultdict(list)

    @contextmanager
    def measure(self, stage: str, backend: str) -> Iterator[None]:
        """Add the time that the block takes to the stage."""
        span = _Span()
        try:
            yield
        finally:
            span.stop()
            self._spans[stage, backend].append(span)

    def read(self) -> dict[str, StageTime]:
        """The times since the last read, by stage; on a GPU this waits for the work to end.

        A stage that several backends served is listed under each, as `stage (backend)` from the second on.
        """
        times: dict[str, StageTime] = {}
        for (stage, backend), spans in self._spans.items():
            name = f"{stage} ({backend})" if stage in times else stage
            times[name] = StageTime(backend, sum(span.milliseconds() for span in spans), len(spans))
        self._spans.clear()
        return times


class _Span:
    """One use: CUDA events where there is a GPU at work, else the wall clock."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_initialized()
        self._start = self._now()
        self._end = self._start

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._end = self._now()

    def milliseconds(self) -> float:
        if isinstance(self._start, torch.cuda.Event) and isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
            return self._start.elapsed_time(self._end)
        return 1000 * (cast(float, self._end) - cast(float, self._start))
