"""What to say where a run does not fit the memory of a device: how much is missing, and what makes it fit."""

from __future__ import annotations

from frostline.train.memory.plan import MemoryPlan
from frostline.train.settings import RunSettings

_GB = 1e9


def memory_problem(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> str | None:
    """One sentence where the plan is larger than the device; None where it fits, or the device is not known."""
    needed = needed_bytes(plan, settings, on_cpu)
    if plan.device_bytes is None or needed <= plan.device_bytes:
        return None
    resident, there = plan.resident / _GB, plan.device_bytes / _GB
    always = f", {resident:.2f} of them all the time" if resident > there else ""
    return f"memory: {needed / _GB:.2f} GB of each device are needed{always}, and {there:.2f} are there"


def needed_bytes(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> int:
    """The peak of both phases; where what is kept for backward waits in main memory, at least that.

    Args:
        on_cpu: whether the device is a CPU, whose memory is main memory.
    """
    return max([plan.peak - waiting_bytes(plan, settings, on_cpu), *plan.precompute.values()])


def waiting_bytes(plan: MemoryPlan, settings: RunSettings, on_cpu: bool) -> int:
    """What waits in main memory for backward, instead of on the device."""
    if on_cpu or not settings.offload_saved_tensors:
        return 0
    return sum(stage.kept for stage in plan.stages)
