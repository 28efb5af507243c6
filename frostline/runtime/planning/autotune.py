"""Latencies of a stage's backends at one shape: measured once per machine, interleaved, and cached."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from frostline.documents import parse_json
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.user_cache import cache_folder, recall, remember

# Environment variables of OpenMP's wait policy, which changes the latency of torch by about 17 %.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def machine_id(device: torch.device) -> str:
    """Return an id of the machine for latencies: the GPU; or CPU, numbers of cores and threads, and wait policy."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    waiting = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    return ", ".join([_processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads", *waiting])


@cache
def _processor() -> str:
    """Return the model of the CPU: name, family and stepping, because clouds use one name for many models."""
    known = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines) if name.strip() in known}
    return " ".join(facts[name] for name in known if name in facts) or platform.machine()


def shape_class(inputs: Mapping[str, Tensor]) -> str:
    """Return names and shapes with sizes rounded up to 1, 2, 3, 4, 6, 8, 12, 16, …, to limit the number of
    measurements.
    """
    shapes = (f"{name}:{'x'.join(str(_rounded(extent)) for extent in inputs[name].shape)}" for name in sorted(inputs))
    return " ".join(shapes)


def _rounded(extent: int) -> int:
    if extent < 3:
        return extent
    power = 1 << (extent - 1).bit_length()
    return power * 3 // 4 if extent <= power * 3 // 4 else power


def take_turns(runs_of: Mapping[str, Callable[[], object]], runs: int, seconds: float) -> dict[str, float]:
    """Return median milliseconds by name; the runs are interleaved, so that other load affects all of them.

    Args:
        runs: number of runs of each, after one warm-up run.
        seconds: time limit; no further round starts after it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs_of}
    with torch.no_grad():
        for run in runs_of.values():
            run()
        deadline = time.monotonic() + seconds
        for _ in range(runs):
            for name, run in runs_of.items():
                times[name].append(_time_ms(run))
            if time.monotonic() > deadline:
                break
    return {name: statistics.median(samples) for name, samples in times.items()}


def _time_ms(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return 1000 * (time.perf_counter() - start)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class LatencyNote:
    """A file in the user cache with the latencies of one set of candidates at one shape on one machine.

    Args:
        contenders: id of the engine, by backend; for torch, the id of its code.
        shape: see `shape_class`.
    """

    def __init__(self, stage: str, contenders: Mapping[str, str], shape: str, device: torch.device) -> None:
        measured_by = computation_id([__name__])
        facts = [measured_by, machine_id(device), stage, shape, *sorted(contenders.values())]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        self._path = cache_folder() / "latency" / f"{key}.json"
        self._backends = set(contenders)

    def read(self) -> dict[str, float] | None:
        """Return milliseconds by backend; None if they have not been measured."""
        try:
            noted = parse_json(recall(self._path) or "null")
        except ValueError:
            return None
        whole = isinstance(noted, dict) and noted.keys() == self._backends
        if not whole or not all(isinstance(value, float) and value > 0 for value in noted.values()):
            return None
        return noted

    def write(self, latency_ms: Mapping[str, float]) -> dict[str, float]:
        """Store latencies unless another process already has, and return the stored ones.

        All processes on a machine, and a resumed run, then choose the same backends.
        """
        if self.read() is None:
            damaged = os.path.lexists(self._path)
            remember(self._path, json.dumps(dict(latency_ms)), keep=not damaged)
        return self.read() or dict(latency_ms)
