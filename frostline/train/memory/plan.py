"""The memory plan of a run: weights, engines, adapter and activations of each stage against a device's memory."""

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

# What is divided among the processes: of the live denoiser its frozen weights, and the adapter with what trains it,
# but for FSDP2: engines read the adapter's memory, so `train/loop/sharding.py` leaves it whole.
_DIVIDED: Mapping[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"weights", "adapter", "gradients", "optimizer"}),
    "fsdp": frozenset({"weights"}),
}


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
    bytes of all LoRAs and what trains them. peaks: by phase of a step, the most activations that are held at once.
    precompute: by stage, what is held while it alone is at work before the first step; training does without it.
    offloaded_blocks: how many blocks of each denoiser wait in main memory. main_memory: bytes that they take there.
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
    precompute: Mapping[str, int] = field(default_factory=dict)
    offloaded_blocks: int = 0
    main_memory: int = 0

    @property
    def resident(self) -> int:
        """What is held all the time."""
        own = sum(stage.weights + stage.engine for stage in self.stages)
        return own + self.adapter + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most that training holds at once."""
        return self.resident + max(self.peaks.values())

    @property
    def fits(self) -> bool | None:
        """Whether both phases are within the device's memory; None where that is not known."""
        most = max(self.peak, *self.precompute.values()) if self.precompute else self.peak
        return None if self.device_bytes is None else most <= self.device_bytes


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
    """Plan the memory of a run without reading weights: on the model's files, or on the release it is named after.

    Counted are tensors. Not counted are the scratch space of kernels and engines, what an allocator holds back, the
    context of CUDA, and what rewards and judges compute without gradient.

    Args:
        shape: of one device's batch.
        engines: stages that an engine with its own weights serves; "all" that no gradient ever flows to.
        device_bytes: memory of one device.
        rewards: whose networks count too.
        judges: bytes of the networks of each judge, by its name.
        precomputed: frozen stages whose outputs are computed before training, each alone, and which it does without.
        measurements: of this model, if others were planned before.
        quantization: how weights are stored; an engine has them dequantised.
        offload_blocks: how many blocks of each denoiser wait in main memory, for one process.
    Raises:
        ConfigError: there is no such model, stage or way to shard.
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
    # The share of each live denoiser, and the block that is gathered while it computes.
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
    """Return the bytes of the blocks that wait in main memory, and the most that copies of them take on the device."""
    waiting = sorted(blocks[place] for place in waiting_blocks(count, len(blocks)))
    return sum(waiting), sum(waiting[-WINDOW:])
