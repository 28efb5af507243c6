"""The memory plan of a run: weights, engines, adapter and activations of each stage against a device's memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from frostline.config import AUTO, CHECKPOINTING, GradientCheckpointing, TrainingModuleSettings
from frostline.errors import ConfigError
from frostline.models.geometry import VideoShape
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.skeleton import read_skeleton
from frostline.train.footprint import Footprint, measure_embedder, measure_model

Sharding = Literal["ddp", "zero2", "zero3", "fsdp"]

# What is divided among the processes: of the live denoiser its frozen weights, and the adapter with what trains it,
# but for FSDP2: engines read the adapter's memory, so `train/sharding.py` leaves it whole.
_DIVIDED: Mapping[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"weights", "adapter", "gradients", "optimizer"}),
    "fsdp": frozenset({"weights"}),
}
# Frozen wherever they are used: PyTorch needs no weights of them once an engine or the cache serves them.
_ALWAYS_FROZEN = ("text_encoder", "image_encoder", "vae_encoder", "denoiser_high_noise")
_LIVE = ("denoiser", "vae_decoder", "face_embedder")
# Of what is free, where it is to be chosen how much is recomputed. Counted are tensors: kernels want scratch space,
# allocators whole pages, engines memory of their own.
USABLE = 0.8
# AdamW keeps two moments of every trained value.
MOMENTS = 2


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one device.

    weights: of PyTorch. engine: of an engine's own copy. frozen_peak: while it runs without gradient. kept: by all its
    live uses of a step together, until backward. live_peak: the most that one live use holds in forward or backward.
    """

    stage: str
    weights: int
    engine: int
    frozen_peak: int
    kept: int
    live_peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """What one device holds.

    gradient_checkpointing: the kind; where memory is to choose, the first that fits. adapter, gradients, optimizer:
    bytes of the LoRA and what trains it. peaks: by phase of a step, the most activations that are held at once.
    device_bytes: what there is, if known. assumed: that the sizes are those of a release, because there were no files.
    """

    model: str
    gradient_checkpointing: GradientCheckpointing
    stages: tuple[StageMemory, ...]
    adapter: int
    gradients: int
    optimizer: int
    peaks: Mapping[str, int]
    num_processes: int
    sharding: Sharding
    device_bytes: int | None
    assumed: bool

    @property
    def resident(self) -> int:
        """What is held all the time."""
        own = sum(stage.weights + stage.engine for stage in self.stages)
        return own + self.adapter + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.resident + max(self.peaks.values())

    @property
    def fits(self) -> bool | None:
        """Whether it is within the device's memory; None where that is not known."""
        return None if self.device_bytes is None else self.peak <= self.device_bytes


def memory_plan(
    model: str | Path,
    settings: TrainingModuleSettings,
    shape: VideoShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    engines: Collection[str] | Literal["all"] = (),
    cached: Collection[str] = (),
    num_processes: int = 1,
    sharding: Sharding = "ddp",
    device_bytes: int | None = None,
    embedder: nn.Module | None = None,
) -> MemoryPlan:
    """Plan the memory of a run without reading weights: on the model's files, or on the release it is named after.

    Counted are tensors. Not counted are the scratch space of kernels and engines, what an allocator holds back, the
    context of CUDA, and the face detector.

    Args:
        shape: of one device's batch.
        engines: stages that an engine with its own weights serves; "all" that no gradient ever flows to.
        cached: stages whose outputs are all in the cache, so that they are not loaded at all.
        device_bytes: memory of one device.
        embedder: of the reward, to be counted too.
    Raises:
        ConfigError: there is no such model, stage or way to shard.
    """
    if sharding not in get_args(Sharding):
        raise ConfigError(f"unknown sharding {sharding!r}: use one of {', '.join(get_args(Sharding))}")
    if num_processes < 1:
        raise ConfigError(f"num_processes must be at least 1, not {num_processes}")
    skeleton = read_skeleton(model)
    faces = shape.batch_size * shape.num_frames
    reward = {} if embedder is None else {"face_embedder": measure_embedder(embedder, faces)}

    def plan_with(kind: GradientCheckpointing) -> MemoryPlan:
        measured = measure_model(skeleton, shape, dtype, settings.lora, kind)
        footprints = {**measured.stages, **reward}
        served = [name for name in _ALWAYS_FROZEN if name in footprints] if engines == "all" else engines
        for name in (*served, *cached):
            if name not in footprints:
                raise ConfigError(f"the model has no stage {name!r}; it has {', '.join(footprints)}")
        divided = _DIVIDED[sharding]
        tail = tail_steps(settings, skeleton.boundary if "denoiser_high_noise" in footprints else None)
        stages = []
        for name, footprint in footprints.items():
            weights = footprint.weights
            if name in _ALWAYS_FROZEN and (name in served or name in cached):
                weights = 0
            elif name == "denoiser" and "weights" in divided:
                # Its share, and the block that is gathered while it computes.
                gathered = measured.largest_block if num_processes > 1 else 0
                weights = min(weights, -(-weights // num_processes) + gathered)
            engine = footprint.weights if name in served and name not in cached else 0
            live_peak = max(footprint.forward_peak, footprint.backward_peak)
            kept = footprint.kept * (tail if name == "denoiser" else 1)
            stages.append(StageMemory(name, weights, engine, footprint.frozen_peak, kept, live_peak))

        def share(what: str, size: int) -> int:
            return -(-size // num_processes) if what in divided else size

        return MemoryPlan(
            model=skeleton.name,
            gradient_checkpointing=kind,
            stages=tuple(stages),
            adapter=share("adapter", measured.adapter),
            gradients=share("gradients", measured.adapter),
            optimizer=share("optimizer", MOMENTS * measured.adapter),
            peaks=activation_peaks(footprints, tail),
            num_processes=num_processes,
            sharding=sharding,
            device_bytes=device_bytes,
            assumed=not skeleton.from_files,
        )

    asked = settings.gradient_checkpointing
    kinds = CHECKPOINTING if asked == AUTO else (asked,)
    plans = []
    for kind in kinds:
        plans.append(plan_with(kind))
        if device_bytes is None or max(plans[-1].peaks.values()) <= USABLE * (device_bytes - plans[-1].resident):
            return plans[-1]
    return min(plans, key=lambda plan: plan.peak)


def tail_steps(settings: TrainingModuleSettings, boundary: float | None) -> int:
    """Steps that keep activations for backward: those of the tail that the denoiser with the LoRA serves."""
    first = settings.mid_timestep
    if boundary is not None:
        schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
        boundary = boundary if settings.boundary is None else settings.boundary
        first = max(first, schedule.high_noise_steps(boundary))
    return max(0, settings.final_timestep + 1 - first)


def activation_peaks(footprints: Mapping[str, Footprint], tail: int) -> dict[str, int]:
    """The most activations that are held at once, by phase of a step."""
    denoiser, decoder = footprints["denoiser"], footprints["vae_decoder"]
    embedder = footprints.get("face_embedder", Footprint(0, 0))
    conditioning = [footprints[name].frozen_peak for name in footprints if name in _ALWAYS_FROZEN]
    before_last = denoiser.kept * max(0, tail - 1)
    kept = denoiser.kept * tail
    decoded = kept + decoder.kept
    backward = [
        decoded + embedder.backward_peak,
        kept + decoder.backward_peak,
        before_last + denoiser.backward_peak,
    ]
    return {
        "conditioning": max(conditioning, default=0),
        "rollout": denoiser.frozen_peak,
        # The KL reference runs beside what the step keeps.
        "tail": max(before_last + denoiser.forward_peak, kept + denoiser.frozen_peak),
        "decode": kept + decoder.forward_peak,
        "reward": decoded + embedder.forward_peak,
        "backward": max(backward),
    }
