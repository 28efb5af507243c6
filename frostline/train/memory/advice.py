"""Compare the memory that a run needs on a device with the memory of the device."""

from __future__ import annotations

from frostline.train.memory.plan import MemoryPlan
from frostline.train.settings import RunSettings

_GB = 1e9


def memory_problem(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> str | None:
    """Return a message if the plan exceeds the device memory; None if it fits, or if the device memory is unknown."""
    needed = needed_bytes(plan, settings, on_cpu)
    if plan.device_bytes is None or needed <= plan.device_bytes:
        return None
    resident, there = plan.resident / _GB, plan.device_bytes / _GB
    always = f", {resident:.2f} GB of them resident" if resident > there else ""
    return f"memory: {needed / _GB:.2f} GB per device are needed{always}, but only {there:.2f} GB are available"


def needed_bytes(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> int:
    """Return the peak memory per device of training and of precomputing, in bytes.

    With `offload_saved_tensors`, the activations in main memory are subtracted from the peak of training, which is then
    a lower bound.

    Args:
        on_cpu: whether the device is a CPU, whose memory is main memory.
    """
    return max([plan.peak - waiting_bytes(plan, settings, on_cpu), *plan.precompute.values()])


def waiting_bytes(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> int:
    """Return the bytes of activations that are stored for backward in main memory instead of device memory."""
    if on_cpu or not settings.offload_saved_tensors:
        return 0
    return sum(stage.kept for stage in plan.stages)
