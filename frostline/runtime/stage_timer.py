"""Milliseconds for each use of a stage, measured without making a GPU wait."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch


@dataclass(frozen=True)
class StageTime:
    """Total time of one use of a stage while times were collected.

    Attributes:
        backend: the backends that were used, comma-separated.
        by_backend: calls and milliseconds of each of them.
    """

    backend: str
    milliseconds: float
    calls: int
    by_backend: Mapping[str, tuple[int, float]] = field(default_factory=dict)


class StageTimes:
    """The uses of stages within a `StageClock.collect` block."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, _Span]] = []

    def read(self) -> dict[str, StageTime]:
        """Return the times since the last read, by use. On a GPU, this waits for the work to end."""
        collected, self._spans = self._spans, []
        by_use: dict[str, list[tuple[str, _Span]]] = defaultdict(list)
        for use, backend, span in collected:
            by_use[use].append((backend, span))
        times: dict[str, StageTime] = {}
        for use, spans in by_use.items():
            served: dict[str, tuple[int, float]] = {}
            for backend, span in spans:
                calls, milliseconds = served.get(backend, (0, 0.0))
                served[backend] = calls + 1, milliseconds + span.milliseconds()
            total = sum(milliseconds for _, milliseconds in served.values())
            times[use] = StageTime(", ".join(served), total, len(spans), served)
        return times

    def add(self, use: str, backend: str, span: _Span) -> None:
        """Add the time of one use on a backend."""
        self._spans.append((use, backend, span))


class StageClock:
    """Time each use of a stage, frozen or live, in any thread, while times are being collected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._collecting: list[StageTimes] = []

    @contextmanager
    def collect(self) -> Iterator[StageTimes]:
        """Collect the uses that end within the block. Blocks may be nested; each collects all uses within it."""
        times = StageTimes()
        with self._lock:
            self._collecting.append(times)
        try:
            yield times
        finally:
            with self._lock:
                self._collecting = [other for other in self._collecting if other is not times]

    @contextmanager
    def measure(self, use: str, backend: str) -> Iterator[None]:
        """Time the block as one call of `use`: the name of a frozen stage, `denoise_tail`, …"""
        span = _Span()
        try:
            yield
        finally:
            span.stop()
            with self._lock:
                for times in self._collecting:
                    times.add(use, backend, span)


class _Span:
    """One use: CUDA events if a GPU is used, otherwise wall-clock time."""

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
