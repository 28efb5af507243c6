"""Measure contenders alternately in one process, after a warm-up; report medians and quartiles."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from frostline.atomic_io import atomic_write
from frostline.package_info import installed_versions
from frostline.runtime.backends import engine_packages

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *("frostline", "torch", "onnx", *engine_packages(), "diffsynth", "peft"),
    *("facenet-pytorch", "opencv-python-headless"),
)

Contender = Callable[[], object]


def interleave(
    contenders: Mapping[str, Contender], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the milliseconds of each call, by contender. Contenders alternate, so that other load affects all of them.

    Each round begins with a different contender, because the order can affect the times.

    Args:
        contenders: the functions to time, by name.
        rounds: the number of measured calls of each contender.
        device: the device to synchronize with.
        warm_up: the number of rounds that run first and are not measured.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for index in range(warm_up + rounds):
        first = index % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            milliseconds = time_ms(contenders[name], device)
            if index >= warm_up:
                samples[name].append(milliseconds)
    return samples


def time_ms(run: Contender, device: torch.device) -> float:
    """Return the milliseconds of one call; the device is synchronized before and after it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gpu_gib(run: Contender, device: torch.device) -> float | None:
    """Return the peak memory in GiB that torch allocates on a GPU during one call; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def peak_growth_mib(run: Contender, device: torch.device) -> float:
    """Return the peak growth of memory in MiB during one call: torch's memory on a GPU, otherwise the process's RSS."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        peak = peak_gpu_gib(run, device)
        assert peak is not None
        return 1024 * peak - before / 2**20
    # Return freed memory to the system first; otherwise, the call could reuse it, and the growth would be too small.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak RSS
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def peak_gib() -> float:
    """Return the peak RSS of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def summary(samples: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of the samples (milliseconds), by name."""
    rows = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
        rows[name] = {"median_ms": middle, "quartile_1_ms": low, "quartile_3_ms": high}
    return rows


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each value over the rows; a value that a row lacks counts as 0."""
    names = sorted({name for row in rows for name in row})
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}


def ratio(samples: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Return median and quartiles of `over / under`, where both times of a ratio are from the same round."""
    ratios = {"ratio": [a / b for a, b in zip(samples[over], samples[under], strict=True)]}
    return {name.replace("_ms", ""): value for name, value in summary(ratios)["ratio"].items()}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the device, load, versions and commit of a measurement."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": installed_versions(_PACKAGES),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Return the commit, with `+` if files other than results are modified; without a repository, FROSTLINE_COMMIT."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results"]
        dirty = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FROSTLINE_COMMIT", "unknown")
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
