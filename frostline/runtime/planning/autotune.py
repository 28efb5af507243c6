"""Latencies of a stage's backends at one shape: measured once on a machine, in turns, and noted for the next run."""

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

# How threads wait for work makes torch a sixth faster or slower.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def machine_id(device: torch.device) -> str:
    """What a latency depends on beside engine and shape: the GPU, or processor, torch's threads and how they wait."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    waiting = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    return ", ".join([_processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads", *waiting])


@cache
def _processor() -> str:
    """The model of the CPU; its name alone says little on rented machines, where many models go by one."""
    known = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines) if name.strip() in known}
    return " ".join(facts[name] for name in known if name in facts) or platform.machine()


def shape_class(inputs: Mapping[str, Tensor]) -> str:
    """Names and shapes, every extent rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …: who is faster changes slowly."""
    shapes = (f"{name}:{'x'.join(str(_rounded(extent)) for extent in inputs[name].shape)}" for name in sorted(inputs))
    return " ".join(shapes)


def _rounded(extent: int) -> int:
    if extent < 3:
        return extent
    power = 1 << (extent - 1).bit_length()
    return power * 3 // 4 if extent <= power * 3 // 4 else power


def take_turns(runs_of: Mapping[str, Callable[[], object]], runs: int, seconds: float) -> dict[str, float]:
    """Return median milliseconds by name; they take turns, so that a busy moment hits all of them.

    Args:
        runs: of each, after one that warms up.
        seconds: after which no further round is begun.
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
    """What was measured of the same contenders at the same shape on the same machine, if anything was.

    Args:
        contenders: by backend, what identifies its engine; of torch, the code that it runs.
    """

    def __init__(self, stage: str, contenders: Mapping[str, str], shape: str, device: torch.device) -> None:
        measured_by = computation_id([__name__])
        facts = [measured_by, machine_id(device), stage, shape, *sorted(contenders.values())]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        self._path = cache_folder() / "latency" / f"{key}.json"
        self._backends = set(contenders)

    def read(self) -> dict[str, float] | None:
        """Milliseconds by backend."""
        try:
            noted = parse_json(recall(self._path) or "null")
        except ValueError:
            return None
        whole = isinstance(noted, dict) and noted.keys() == self._backends
        if not whole or not all(isinstance(value, float) and value > 0 for value in noted.values()):
            return None
        return noted

    def write(self, latency_ms: Mapping[str, float]) -> dict[str, float]:
        """Note what was measured; returns what is noted: where another process was faster, what that one measured.

        So that all processes on a machine, and a run that is taken up again, choose alike.
        """
        if self.read() is None:
            damaged = os.path.lexists(self._path)
            remember(self._path, json.dumps(dict(latency_ms)), keep=not damaged)
        return self.read() or dict(latency_ms)
