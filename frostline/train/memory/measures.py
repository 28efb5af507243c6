"""Changes of settings that reduce the memory of a run: the list `MEASURES`, the cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from frostline.config import AUTO, CHECKPOINTING
from frostline.models.block_offload import WINDOW
from frostline.models.video_shape import Geometry, VideoShape
from frostline.runtime.backends import TORCH
from frostline.train.memory.plan import MemoryPlan
from frostline.train.settings import RunSettings

# Values by dotted names of settings, as on the command line.
Changes = Mapping[str, Any]
_DEVICES = (2, 4, 8)
_SHARES = (0.5, 0.25)
_LEAST_FRAMES = 5
_FEWER_BITS = ("int8", "nf4")


class Planner(Protocol):
    """Plans the memory of runs of one model with different settings.

    Attributes:
        geometry: the video sizes that the model supports.
        on_cpu: whether the device is a CPU.
        device_bytes: memory of one device; None if unknown.
    """

    @property
    def geometry(self) -> Geometry: ...
    @property
    def on_cpu(self) -> bool: ...
    @property
    def device_bytes(self) -> int | None: ...
    def shape(self, settings: RunSettings) -> VideoShape:
        """Return the largest shape of a step in one process."""
        ...

    def num_blocks(self, settings: RunSettings, without_lora: bool = False) -> int:
        """Return the number of blocks of the largest denoiser, or of the largest without a LoRA; 0 if there is none."""
        ...

    def plan(self, settings: RunSettings) -> MemoryPlan:
        """Plan the memory of one device."""
        ...

    def cache_bytes(self, settings: RunSettings) -> int:
        """Return the maximum size of precomputed outputs in the cache, in bytes."""
        ...


@dataclass(frozen=True)
class Measure:
    """One way to need less memory.

    Attributes:
        about: a short description.
        lowers: the kind of memory that is reduced.
        costs: `time` (same results), `results` (training differs) or `devices` (more devices are needed).
        values: the possible changes of settings, the mildest first.
        in_run: whether `memory.fit` can apply them in a run.
    """

    about: str
    lowers: Literal["weights", "activations"]
    costs: Literal["time", "results", "devices"]
    values: Callable[[RunSettings, Planner], Iterator[Changes]]
    in_run: bool = True


def _precompute(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if settings.precompute != "always":
        needed = planner.cache_bytes(settings)
        larger = {"cache_bytes": needed} if needed > settings.cache_bytes else {}
        yield {"precompute": "always", **larger}


def _one_sample(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    train = settings.train
    if (batch := train.per_device_train_batch_size) > 1:
        accumulated = batch * train.gradient_accumulation_steps
        yield {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": accumulated}


def _checkpointing(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if settings.gradient_checkpointing != AUTO:
        stronger = CHECKPOINTING[CHECKPOINTING.index(settings.gradient_checkpointing) + 1 :]
        yield from ({"gradient_checkpointing": kind} for kind in stronger)


def _saved_tensors(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if not planner.on_cpu and not settings.offload_saved_tensors:
        yield {"offload_saved_tensors": True}


def _blocks(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    alone = settings.memory.num_processes == 1 and settings.memory.sharding == "ddp"
    if planner.on_cpu or not alone or settings.offload.blocks == AUTO:
        return
    total, frozen = planner.num_blocks(settings), planner.num_blocks(settings, without_lora=True)
    # Up to WINDOW blocks are on the device at the same time, so offloading no more than that saves nothing.
    for count in range(max(WINDOW, settings.offload.number) + 1, total + 1):
        yield {"offload.blocks": count}
    if settings.plan.backend != TORCH and frozen > WINDOW:
        # The engine of an expert without a LoRA contains all of its weights on the device.
        for count in range(total // 2 + WINDOW, total + 1):
            yield {"offload.blocks": count, "plan.backend": TORCH}


def _bf16(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if settings.train.mixed_precision != "bf16":
        yield {"train.mixed_precision": "bf16"}


def _quantised(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if settings.memory.sharding == "ddp" and settings.quantization not in _FEWER_BITS:
        if settings.plan.backend != TORCH:
            # The engine of the frozen expert contains the dequantised weights.
            yield {"quantization": _FEWER_BITS[0]}
        yield from ({"quantization": kind, "plan.backend": TORCH} for kind in _FEWER_BITS)


def _window(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    window = settings.decode.num_latent_frames or _latent_frames(settings, planner)
    while (window := window // 2) >= 1:
        yield {"decode.num_latent_frames": window}


def _live_steps(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    if settings.backprop.strategy == "tail" and settings.grad_end_step > settings.grad_start_step:
        yield {"backprop.strategy": "random", "backprop.num_steps": 1}


def _frames(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    latent_frames = _latent_frames(settings, planner)
    for share in _SHARES:
        frames = planner.geometry.num_frames(max(1, int(share * latent_frames)))
        if _LEAST_FRAMES <= frames < planner.geometry.num_frames(latent_frames):
            yield {"data.num_frames": frames}


def _pixels(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    shape, least = planner.shape(settings), planner.geometry.spatial_multiple
    for share in _SHARES:
        if settings.data.height is None:
            if (pixels := int(share * shape.height * shape.width)) >= least**2:
                yield {"data.max_pixels": pixels}
        else:
            sides = (
                planner.geometry.nearest_side(int(math.sqrt(share) * each)) for each in (shape.height, shape.width)
            )
            yield dict(zip(("data.height", "data.width"), sides, strict=True))


def _rank(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    yield from ({"lora.rank": rank} for share in _SHARES if (rank := int(share * settings.lora.rank)) >= 1)


def _devices(settings: RunSettings, planner: Planner) -> Iterator[Changes]:
    there = settings.memory.num_processes
    counts = [there] if settings.memory.sharding == "ddp" and there > 1 else []
    for count in (*counts, *(each for each in _DEVICES if each > there)):
        whole = {"offload.blocks": 0} if settings.offload.blocks else {}
        yield {"memory.sharding": "fsdp", "memory.num_processes": count, **whole}


def _latent_frames(settings: RunSettings, planner: Planner) -> int:
    shape = planner.shape(settings)
    return planner.geometry.latent_grid(shape.num_frames, shape.height, shape.width)[0]


MEASURES: tuple[Measure, ...] = (
    Measure("precompute frozen outputs before the first step, one stage at a time", "weights", "time", _precompute),
    Measure("batch size 1, with more accumulation steps", "activations", "time", _one_sample),
    Measure("recompute more activations in backward", "activations", "time", _checkpointing),
    Measure("store activations for backward in main memory", "activations", "time", _saved_tensors),
    Measure("offload frozen weights of blocks to main memory", "weights", "time", _blocks),
    Measure("frozen weights and computation in bf16", "weights", "results", _bf16, in_run=False),
    Measure("frozen weights in 8 or 4 bits", "weights", "results", _quantised, in_run=False),
    Measure("score only a window of each clip, chosen at random in each step", "activations", "results", _window),
    Measure("gradient through one denoising step, random in each training step", "activations", "results", _live_steps),
    Measure("fewer frames", "activations", "results", _frames),
    Measure("fewer pixels", "activations", "results", _pixels),
    Measure("lower LoRA rank", "weights", "results", _rank, in_run=False),
    Measure("shard the frozen weights over more devices", "weights", "devices", _devices, in_run=False),
)
