"""Judges: rewards that are not trained on, but that validation uses to score generated videos.

A judge is built like a reward and has its own runtime, so its stages may have the same names as those of a reward or of
another judge. Its weights are frozen, and are not part of a loss or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from frostline.config import OTHERS
from frostline.export.exporter import ensure_verified
from frostline.rewards.active import JUDGE, ActiveReward
from frostline.rewards.build import JUDGES, build_rewards
from frostline.rewards.config import RewardEntry
from frostline.rewards.reward import RewardScore
from frostline.runtime.backends import TORCH
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.planning.plan import PlanSetting
from frostline.runtime.runtime import Runtime
from frostline.stages.shapes import ShapeRange
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.module import TrainingModule


@dataclass(frozen=True, eq=False)
class Judge:
    """A reward with the runtime of its stages.

    Attributes:
        conditioner: computes its references, or reads them from the cache.
    """

    active: ActiveReward
    runtime: Runtime
    conditioner: Conditioner

    @property
    def name(self) -> str:
        """Return the name of its score in logs."""
        return f"{JUDGE}{self.active.label}"

    @torch.no_grad()
    def score(self, frames: Tensor, conditioning: Conditioning, latents: Tensor | None = None) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1]; names of metrics are prefixed with the judge's name.

        Args:
            latents: (B, C, F, h, w) from which the frames were decoded, for judges that need them.
        """
        # In float32, like `TrainingModule.score`, independent of autocast.
        with torch.autocast(frames.device.type, enabled=False):
            (references,) = self.conditioner.references(conditioning.sample, conditioning.sample_keys)
            sample = replace(conditioning.sample, latents=latents)
            scored = self.active.score(frames, sample, references, self.runtime)
        metrics = {f"{self.name}_{name}": values for name, values in scored.metrics.items()}
        return RewardScore(scored.score, scored.valid, metrics, scored.frame_scores)


def build_judges(
    entries: Sequence[RewardEntry],
    module: TrainingModule,
    *,
    plan: PlanSetting,
    engines: Path | None,
    strict: bool,
    shapes: ShapeRange,
) -> tuple[Judge, ...]:
    """Create the judges of a run, with their networks on the device of `module`; called on all processes.

    Args:
        entries: `validation.judges`. Settings that only affect a loss (weight, baseline, scale, cap) are ignored.
        module: its cache stores the references.
        plan, engines, strict: see `Runtime`. If the plan names stages, only those of a judge are used.
    Raises:
        ConfigError: see `build_rewards`.
        EngineError: `strict`, and an engine that the plan names is not available.
    """
    model, judges = module.model, []
    for active in build_rewards(entries, model.device, shapes, JUDGES):
        stages = {stage.name: stage for stage in active.stages}
        if engines is not None and plan != TORCH:
            ensure_verified(stages.values(), EngineStore(engines))
        runtime = Runtime(stages, _own_plan(plan, active), engines, strict)
        runtime.agree_across_processes()
        conditioner = Conditioner(model, runtime, (active,), module.parts.cache)
        judges.append(Judge(active, runtime, conditioner))
    return tuple(judges)


def _own_plan(plan: PlanSetting, active: ActiveReward) -> PlanSetting:
    if isinstance(plan, str):
        return plan
    return {name: backend for name, backend in plan.items() if name in (OTHERS, *active.stage_names)}
