"""Describe the machine of a run (processor and GPU), and measure the peak memory of the run."""

from __future__ import annotations

import os
import resource
import sys

import torch

from frostline.package_info import processor

_GB = 1e9


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the names of the processor and, if `device` is a GPU, of the GPU with its memory."""
    machine = {"processor": f"{processor()}, {os.cpu_count()} cores"}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / _GB
        machine["gpu"] = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    return machine


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB: for a GPU, of its tensors since the last call; for a CPU, of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / _GB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB
