"""Compare the memory that a run needs on a device with the memory of the device."""

from __future__ import annotations

from frostline.train.memory.plan import MemoryPlan

_GB = 1e9


def memory_problem(plan: MemoryPlan) -> str | None:
    """Return a message if the plan exceeds the device memory; None if it fits, or if the device memory is unknown."""
    if plan.device_bytes is None or plan.fits:
        return None
    needed, resident, there = plan.needed / _GB, plan.resident / _GB, plan.device_bytes / _GB
    always = f", {resident:.2f} GB of them resident" if resident > there else ""
    return f"memory: {needed:.2f} GB per device are needed{always}, but only {there:.2f} GB are available"
