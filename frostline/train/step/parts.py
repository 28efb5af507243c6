"""The parts of a training step, created from a loaded model and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError
from frostline.export.exporter import ensure_verified
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import FlowMatchSchedule
from frostline.rewards.active import ActiveReward
from frostline.rewards.build import build_rewards
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import PlanSetting, Runtime
from frostline.stages.families import family_of
from frostline.stages.shapes import ShapeRange
from frostline.stages.staged_model import stage_model
from frostline.stages.video_model import VideoModel
from frostline.train.step.conditioning import Conditioner
from frostline.train.step.rollout import Sampler
from frostline.train.step.stale_latents import StaleLatents
from frostline.train.step_settings import TrainingModuleSettings


@dataclass(frozen=True)
class StepParts:
    """The parts of a training step.

    Attributes:
        steps: which denoising steps are frozen or live, and their experts.
        stale: stores latents before the first live step for reuse in later optimizer steps.
    """

    model: VideoModel
    runtime: Runtime
    rewards: tuple[ActiveReward, ...]
    cache: FrozenOutputCache | None
    conditioner: Conditioner
    steps: DenoiseSteps
    sampler: Sampler
    stale: StaleLatents | None


def build_parts(
    components: Any,
    settings: TrainingModuleSettings,
    plan: PlanSetting,
    engines: Path | None,
    strict: bool,
    shapes: ShapeRange,
) -> StepParts:
    """Inject the LoRA, create stages and rewards, verify engines that were built elsewhere, and choose the plan.

    Args:
        components: a loaded model of any family; LoRA layers are added in place.
        plan, engines, strict: see `Runtime`.
    Raises:
        ConfigError: LoRA, rewards or plan cannot be created from the settings.
    """
    # The model first, so that its LoRA only depends on the seed, not on random numbers of the networks of rewards.
    model = family_of(components).video_model(components, settings.lora)
    rewards = build_rewards(settings.rewards, model.device, shapes)
    stages = stage_model(model, [stage for active in rewards for stage in active.stages], shapes).stages
    if engines is not None and plan != TORCH:
        ensure_verified(stages.values(), EngineStore(engines))
    if settings.torch_compile:
        for expert in model.experts:
            if expert.module.offload is not None:
                raise ConfigError("offload.blocks: offloaded blocks cannot be compiled: remove torch_compile")
            expert.module.compile_blocks()
    runtime = Runtime(stages, plan, engines, strict)
    cache = FrozenOutputCache(settings.cache_dir, settings.cache_bytes) if settings.cache_bytes else None
    steps = DenoiseSteps.of(settings, model.boundary, len(model.experts) > 1)
    schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
    return StepParts(
        model=model,
        runtime=runtime,
        rewards=rewards,
        cache=cache,
        conditioner=Conditioner(model, runtime, rewards, cache, with_clips=settings.sft_weight > 0),
        steps=steps,
        sampler=Sampler(model, runtime, schedule, steps),
        stale=StaleLatents(settings.rollout.max_age) if settings.rollout.max_age else None,
    )
