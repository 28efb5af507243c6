"""Milliseconds per use of a stage, measured without making a GPU wait."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True)
class StageTime:
    """Time of one use of a stage since the clock was last read: so many calls, on `backend`.

    Where several backends served it, they are all named, comma-separated.
    """

    backend: str
    milliseconds: float
    calls: int


class StageClock:
    """Collects the time of each use of a stage, frozen or live, from any thread, until `read`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, list[tuple[str, _Span]]] = defaultdict(list)

    @contextmanager
    def measure(self, use: str, backend: str) -> Iterator[None]:
        """Add the time that the block takes to a use: a stage's name where it is frozen, `denoise_tail`, …"""
        span = _Span()
        try:
            yield
        finally:
            span.stop()
            with self._lock:
                self._spans[use].append((backend, span))

    def read(self) -> dict[str, StageTime]:
        """The times since the last read, by use; on a GPU this waits for the work to end."""
        times: dict[str, StageTime] = {}
        with self._lock:
            collected, self._spans = self._spans, defaultdict(list)
        for use, spans in collected.items():
            backends = ", ".join(dict.fromkeys(backend for backend, _ in spans))
            times[use] = StageTime(backends, sum(span.milliseconds() for _, span in spans), len(spans))
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
