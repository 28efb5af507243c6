"""Plan the memory of a run: weights, engines, adapter and activations of each stage on one device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from frostline.config import NOT_QUANTISED, GradientCheckpointing, QuantizationSettings, Sharding
from frostline.errors import ConfigError
from frostline.models.block_offload import WINDOW, waiting_blocks
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.video_shape import VideoShape
from frostline.rewards.reward import Reward
from frostline.train.memory.activation_peaks import activation_peaks
from frostline.train.memory.checkpointing import MOMENTS, least_recomputation
from frostline.train.memory.measurements import Measurements
from frostline.train.memory.memory_profile import live_uses
from frostline.train.step_settings import TrainingModuleSettings

# What each kind of sharding divides among the processes; "weights" are the frozen weights of the live denoisers. With
# FSDP2, `train/loop/sharding.py` does not shard the adapter, because engines read its memory.
_DIVIDED: Mapping[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"weights", "adapter", "gradients", "optimizer"}),
    "fsdp": frozenset({"weights"}),
}


@dataclass(frozen=True)
class StageMemory:
    """Memory of one stage on one device, in bytes.

    Attributes:
        weights: weights in PyTorch.
        engine: weights in an engine.
        frozen_peak: peak of a use without a gradient.
        kept: memory that all live uses in a step keep until backward.
        live_peak: peak of one live use in forward or backward.
    """

    stage: str
    weights: int
    engine: int
    frozen_peak: int
    kept: int
    live_peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run on one device; sizes are in bytes.

    Attributes:
        gradient_checkpointing: the kind; with `auto`, the first kind that fits, or else the one with the lowest peak.
        adapter, gradients, optimizer: size of all LoRAs, of their gradients, and of their optimizer state.
        peaks: peak of the activations in each phase of a step.
        precompute: memory of each stage that is precomputed before the first step; training does not need these stages.
        offloaded_blocks: number of blocks of each denoiser that are offloaded to main memory.
        main_memory: size of these blocks.
        offloaded_activations: size of the activations that are stored for backward in main memory.
        device_bytes: memory of the device; None if unknown.
        assumed: whether the sizes are those of a release, because the model has no files.
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
    precompute: Mapping[str, int] = field(default_factory=dict)
    offloaded_blocks: int = 0
    main_memory: int = 0
    offloaded_activations: int = 0

    @property
    def resident(self) -> int:
        """Return the resident memory: weights, engines, adapter, gradients and optimizer state."""
        own = sum(stage.weights + stage.engine for stage in self.stages)
        return own + self.adapter + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Return the peak memory of training; with offloaded activations, a lower bound of it."""
        return self.resident + max(self.peaks.values()) - self.offloaded_activations

    @property
    def needed(self) -> int:
        """Return the peak memory of training and of precomputing."""
        return max([self.peak, *self.precompute.values()])

    @property
    def fits(self) -> bool | None:
        """Return whether training and precomputing fit in the device memory; None if it is unknown."""
        return None if self.device_bytes is None else self.needed <= self.device_bytes


def memory_plan(
    model: str | Path,
    settings: TrainingModuleSettings,
    shape: VideoShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    engines: Collection[str] | Literal["all"] = (),
    num_processes: int = 1,
    sharding: Sharding = "ddp",
    device_bytes: int | None = None,
    rewards: Sequence[Reward] = (),
    judges: Mapping[str, int] | None = None,
    precomputed: Collection[str] = (),
    measurements: Measurements | None = None,
    quantization: QuantizationSettings = NOT_QUANTISED,
    offload_blocks: int = 0,
) -> MemoryPlan:
    """Plan the memory of a run without reading weights.

    Tensors are counted. The workspace of kernels and engines, the memory that an allocator reserves, the CUDA context,
    and what rewards and judges compute without a gradient are not counted.

    Args:
        model: built-in model or folder; if the folder has no files, the sizes of the release with its name are used.
        settings: settings of a step.
        shape: shape of the batch of one device.
        dtype: floating-point type of the frozen weights.
        engines: stages that run on an engine with its own weights; "all" for all stages without a gradient.
        num_processes: number of processes, one per device.
        sharding: how weights, gradients and optimizer state are sharded over the processes.
        device_bytes: memory of one device; None if unknown.
        rewards: rewards, whose networks are counted, too.
        judges: size of the networks of each judge in bytes, by its name.
        precomputed: frozen stages whose outputs are computed before training, one stage at a time.
        measurements: measurements of this model from earlier plans.
        quantization: storage format of the weights; an engine contains dequantised weights.
        offload_blocks: number of blocks of each denoiser that are offloaded to main memory; requires one process.
    Raises:
        ConfigError: there is no such model, stage or kind of sharding.
    """
    if sharding not in get_args(Sharding):
        raise ConfigError(f"unknown sharding {sharding!r}: use one of {', '.join(get_args(Sharding))}")
    if num_processes < 1:
        raise ConfigError(f"num_processes must be at least 1, not {num_processes}")
    measured = Measurements(model) if measurements is None else measurements
    family, spec, lora = measured.family, measured.spec, settings.lora
    empty, parameters = measured.model(dtype, lora, quantization), measured.weights(dtype, lora, quantization)
    of_rewards = measured.rewards(rewards, settings.decode.rewarded(shape, empty.geometry))
    weights = {**parameters.stages, **{name: footprint.weights for name, footprint in of_rewards.items()}}
    trained = {expert.stage for expert in empty.experts if expert.trained}
    frozen = [name for name in family.FROZEN_STAGES if name in weights and name not in trained]
    served = frozen if engines == "all" else engines
    for name in served:
        if name not in weights:
            raise ConfigError(f"the model has no stage {name!r}; it has {', '.join(weights)}")
    of_engines = {name: size for name, size in {**weights, **parameters.dequantised}.items() if name in served}
    divided = _DIVIDED[sharding]

    def share(what: str, size: int) -> int:
        return -(-size // num_processes) if what in divided else size

    adapter, gradients = share("adapter", parameters.adapter), share("gradients", parameters.adapter)
    optimizer = share("optimizer", MOMENTS * parameters.adapter)
    for name in weights:
        if name in frozen and name in served:
            weights[name] = 0
    waiting = {}
    for name, blocks in parameters.blocks.items():
        if offload_blocks and weights[name]:
            waiting[name], copies = _offloaded(blocks, offload_blocks)
            weights[name] += copies - waiting[name]
    alone = {name: weights[name] + of_engines.get(name, 0) for name in precomputed}
    weights |= dict.fromkeys(precomputed, 0)
    of_engines |= dict.fromkeys(precomputed, 0)
    # A live denoiser needs its shard, and the gathered weights of at most one block while it computes.
    for name, block in parameters.largest_blocks.items():
        weights[name] = min(weights[name], share("weights", weights[name]) + block)
    steps = DenoiseSteps.of(settings, spec.boundary, spec.two_experts)
    uses = [*empty.uses(steps), *live_uses(of_rewards, steps.clips)]
    uses = [use for use in uses if use.stage not in precomputed]
    judging = judges or {}
    held = sum(weights.values()) + sum(of_engines.values()) + sum(judging.values()) + adapter
    choice = least_recomputation(
        settings.gradient_checkpointing,
        lambda kind: (
            measured.stages(dtype, lora, shape, kind, settings.decode.num_latent_frames, quantization) | of_rewards
        ),
        uses,
        gradients + optimizer,
        None if device_bytes is None else device_bytes - held,
    )
    stages = []
    for name, footprint in choice.footprints.items():
        live_peak = max(footprint.forward_peak, footprint.backward_peak)
        kept = footprint.kept * sum(use.count for use in uses if use.live and use.stage == name)
        engine = of_engines.get(name, 0)
        frozen_peak = 0 if name in precomputed else footprint.frozen_peak
        stages.append(StageMemory(name, weights[name], engine, frozen_peak, kept, live_peak))
    stages += [StageMemory(name, size, 0, 0, 0, 0) for name, size in judging.items()]
    return MemoryPlan(
        model=spec.name,
        gradient_checkpointing=choice.kind,
        stages=tuple(stages),
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        peaks=activation_peaks(choice.footprints, uses),
        num_processes=num_processes,
        sharding=sharding,
        device_bytes=device_bytes,
        assumed=not spec.from_files,
        offloaded_blocks=offload_blocks,
        main_memory=max(
            [
                *(waiting.get(name, 0) for name in alone),
                sum(size for name, size in waiting.items() if name not in alone),
            ]
        ),
        precompute={name: size + choice.footprints[name].frozen_peak for name, size in alone.items()},
    )


def _offloaded(blocks: Sequence[int], count: int) -> tuple[int, int]:
    """Return the bytes of the offloaded blocks, and the maximum bytes of their copies on the device."""
    waiting = sorted(blocks[place] for place in waiting_blocks(count, len(blocks)))
    return sum(waiting), sum(waiting[-WINDOW:])
