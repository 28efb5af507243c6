"""What to say where a run does not fit the memory of a device: how much is missing, and which settings need less."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.config import AUTO, CHECKPOINTING
from frostline.train.memory.plan import MemoryPlan
from frostline.train.settings import RunSettings

_GB = 1e9


def memory_problem(plan: MemoryPlan, settings: RunSettings) -> str | None:
    """One sentence where the plan is larger than the device; None where it fits, or the device is not known."""
    needed = needed_bytes(plan, settings)
    if plan.device_bytes is None or needed <= plan.device_bytes:
        return None
    resident, there = plan.resident / _GB, plan.device_bytes / _GB
    always = f", {resident:.2f} of them all the time" if resident > there else ""
    return (
        f"memory: {needed / _GB:.2f} GB of each device are needed{always}, and {there:.2f} are there; "
        f"settings that need less: {', '.join(smaller_settings(plan, settings))}"
    )


def needed_bytes(plan: MemoryPlan, settings: RunSettings) -> int:
    """The peak of both phases; where what is kept for backward waits in main memory, at least that."""
    waiting = sum(stage.kept for stage in plan.stages) if settings.offload_saved_tensors else 0
    training = plan.peak - (waiting if settings.device != "cpu" else 0)
    return max([training, *plan.precompute.values()])


def smaller_settings(plan: MemoryPlan, settings: RunSettings) -> Iterator[str]:
    """Settings of which another value needs less, first those that matter most."""
    activations = [*_of_activations(settings)]
    weights = [*_of_weights(plan, settings)]
    # Where the weights alone do not fit, no smaller video does.
    weights_fit = plan.device_bytes is None or plan.resident <= plan.device_bytes
    yield from [*activations, *weights] if weights_fit else weights


def _of_weights(plan: MemoryPlan, settings: RunSettings) -> Iterator[str]:
    if settings.train.mixed_precision == "no":
        yield "train.mixed_precision: bf16"
    if settings.quantization == "none":
        yield "quantization: int8, fp8 or nf4"
    yield "memory.sharding: fsdp with more memory.num_processes" if plan.sharding == "ddp" else "memory.num_processes"
    if settings.lora.rank > 1:
        yield "lora.rank"


def _of_activations(settings: RunSettings) -> Iterator[str]:
    if settings.gradient_checkpointing not in (AUTO, CHECKPOINTING[-1]):
        yield "gradient_checkpointing: auto"
    if not settings.offload_saved_tensors and settings.device != "cpu":
        yield "offload_saved_tensors: true"
    if settings.train.per_device_train_batch_size > 1:
        yield "train.per_device_train_batch_size"
    yield "data.max_pixels" if settings.data.height is None else "data.height and data.width"
    yield "data.num_frames"
