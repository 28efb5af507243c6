"""The machine that a run is on: its processor and GPU, and the peak of the memory that the run takes of it."""

from __future__ import annotations

import os
import resource
import sys

import torch

from frostline.package_info import processor

_GB = 1e9


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the processor, and the GPU where the run is on one."""
    machine = {"processor": f"{processor()}, {os.cpu_count()} cores"}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / _GB
        machine["gpu"] = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    return machine


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB: of tensors on a GPU since the last call; else of this process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / _GB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB
