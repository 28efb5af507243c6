"""Compute frozen outputs before a run, with only the current stage's weights in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from frostline.config import OTHERS
from frostline.export.exporter import ensure_verified
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import FlowMatchSchedule
from frostline.rewards.build import build_rewards
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import weights_sha256
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Stage
from frostline.stages.conditions import Condition
from frostline.stages.families import family_of
from frostline.stages.shapes import ShapeRange
from frostline.stages.video_model import VideoModel
from frostline.train.precompute.visits import Visit
from frostline.train.settings import RunSettings
from frostline.train.step.conditioning import Conditioner, FittedBatch, row_keys, stages_of
from frostline.train.step.rollout import Leading, Sampler


class Frozen(Protocol):
    """Lists the frozen outputs of samples, and computes them.

    Attributes:
        conditioner: its cache stores the outputs.
        runtime: runs the stages.
    """

    @property
    def conditioner(self) -> Conditioner: ...
    @property
    def runtime(self) -> Runtime: ...

    def of(self, visit: Visit, fitted: FittedBatch) -> Sequence[Condition]:
        """Return all frozen outputs of the samples, not yet computed, in an order in which they can be computed."""
        ...


def load_without_live_parts(settings: RunSettings, device: torch.device) -> VideoModel:
    """Load a model without LoRA. The weights of frozen parts are read when they are needed, those of other parts never.

    Raises:
        ConfigError: its files do not match.
    """
    family = family_of(settings.model)
    adapters = settings.base_adapters
    dtype = settings.train.weight_dtype
    components = family.load(
        *(settings.model, dtype, device, True, adapters),
        live=False,
        quantization=settings,
        offload_blocks=settings.offload.number,
    )
    return family.video_model(components, None)


def frozen_stages(model: VideoModel, settings: RunSettings, stages: Sequence[str]) -> tuple[str, ...]:
    """Return the stages whose outputs can all be computed before training.

    This includes an expert without a LoRA if it runs the leading steps, and the noise is fixed.

    Args:
        stages: the stages of the family without a gradient, whether or not the model has them.
    """
    experts = [each.stage for each in model.experts]
    ahead = len(experts) > 1 and not settings.lora.has_lora("high") and settings.noise_seed is not None
    there = model.stage_parameters()
    return tuple(each for each in stages if each in there and (each not in experts or (ahead and each == experts[0])))


@dataclass(frozen=True)
class FrozenModel:
    """The conditions of a model, and the latents after the leading steps of an expert without a LoRA; implements
    `Frozen`.

    Attributes:
        ahead: whether these latents are computed.
    """

    conditioner: Conditioner
    runtime: Runtime
    sampler: Sampler
    ahead: bool

    @classmethod
    def of_settings(
        cls, model: VideoModel, settings: RunSettings, shapes: ShapeRange, cache: FrozenOutputCache, verify: bool = True
    ) -> FrozenModel:
        """Create the object that computes the frozen outputs of a model.

        Args:
            model: from `load_without_live_parts`.
            verify: verify engines that were built elsewhere against PyTorch.
        Raises:
            EngineError: `plan.strict`, and an engine that the plan names is not available.
        """
        family = family_of(model.components)
        names = frozen_stages(model, settings, family.FROZEN_STAGES)
        runtime = _runtime({s.name: s for s in model.stages(shapes) if s.name in names}, settings, verify)
        steps = DenoiseSteps.of(settings, model.boundary, len(model.experts) > 1)
        schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
        conditioner = Conditioner(model, runtime, (), cache, with_clips=settings.sft_weight > 0)
        sampler = Sampler(model, runtime, schedule, steps)
        return cls(conditioner, runtime, sampler, sampler.frozen_steps > 0 and model.experts[0].stage in names)

    def of(self, visit: Visit, fitted: FittedBatch) -> Sequence[Condition]:
        """Return conditions, latents of clips, and latents after the leading steps."""
        conditioner, model, source = self.conditioner, self.conditioner.model, visit.source
        conditions = conditioner.conditions(fitted)
        frozen = [*conditions]
        if source.on_clips:
            frozen.append(model.clip_latents(fitted.video, self.runtime))
        if self.ahead and source.noise is not None:
            noise = source.noise(fitted.latent_shape(model), visit.rows).to(model.device)

            def given() -> Mapping[str, torch.Tensor]:
                return conditioner.conditioning(fitted, conditions).conditions

            leading = Leading(row_keys(conditions), stages_of(conditions), given, noise)
            frozen.append(self.sampler.after(self.sampler.frozen_steps, leading, conditioner))
        return frozen


@dataclass(frozen=True)
class FrozenReferences:
    """The references of rewards for the samples; implements `Frozen`."""

    conditioner: Conditioner
    runtime: Runtime

    @classmethod
    def of_settings(
        cls, model: VideoModel, settings: RunSettings, shapes: ShapeRange, cache: FrozenOutputCache
    ) -> FrozenReferences:
        """Create the object that computes the references of a run's rewards.

        Raises:
            ConfigError: a reward cannot be created from its settings.
            EngineError: see `FrozenModel.of_settings`.
        """
        rewards = build_rewards(settings.rewards, model.device, shapes)
        runtime = _runtime({stage.name: stage for each in rewards for stage in each.stages}, settings, verify=True)
        return cls(Conditioner(model, runtime, rewards, cache, settings.sft_weight > 0), runtime)

    def of(self, visit: Visit, fitted: FittedBatch) -> Sequence[Condition]:
        """Return the references of each reward that uses references."""
        conditioner = self.conditioner
        each = (conditioner.reference_of(active, fitted.sample, fitted.sample_keys) for active in conditioner.rewards)
        return [condition for condition in each if condition is not None]


def _runtime(stages: Mapping[str, Stage], settings: RunSettings, verify: bool) -> Runtime:
    """Return a runtime of these stages, without weights in memory unless they are needed."""
    plan = settings.plan
    if verify and plan.engines is not None and plan.as_plan() != TORCH:
        ensure_verified(stages.values(), EngineStore(plan.engines))
    for stage in stages.values():
        # The plan needs the digests of all stages; if necessary, their weights are read one after the other.
        if verify and stage.weights is not None:
            weights_sha256(stage)
            stage.weights.release()
    wanted = plan.as_plan()
    own = wanted if isinstance(wanted, str) else {k: v for k, v in wanted.items() if k in (OTHERS, *stages)}
    return Runtime(stages, own, plan.engines, plan.strict)
