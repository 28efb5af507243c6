"""Judges: rewards that training never sees, and validation asks what they think of what training made.

A judge is built as a reward is, and has a runtime of its own, so its stages may go by the names of a reward's or of
another judge's. Its weights are frozen, part of no loss and of no checkpoint.
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
    """A reward with what serves its stages. conditioner: computes or recalls its references."""

    active: ActiveReward
    runtime: Runtime
    conditioner: Conditioner

    @property
    def name(self) -> str:
        """What logs call its score."""
        return f"{JUDGE}{self.active.label}"

    @torch.no_grad()
    def score(self, frames: Tensor, conditioning: Conditioning, latents: Tensor | None = None) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1]; its metrics go by the judge's name and their own.

        Args:
            latents: (B, C, F, h, w) that the frames were decoded from, for judges that need them.
        """
        # In float32 as `TrainingModule.score` is, whatever autocast surrounds it.
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
    """Build the judges of a run, their networks on the device of `module`; called on all processes.

    Args:
        entries: `validation.judges`. What only weighs a score in the loss (weight, baseline, scale, cap) counts for
            nothing.
        module: whose cache keeps their references.
        plan, engines, strict: see `Runtime`. Of a plan that names stages, those of a judge.
    Raises:
        ConfigError: see `build_rewards`.
        EngineError: `strict`, and an engine that the plan names cannot be had.
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
