"""Sharpness and motion of generated clips relative to the true clips: measured in every validation, not part of a
verdict.

Reward hacking often changes one of them, even if no judge is configured for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from frostline.rewards.build import JUDGES, build_rewards
from frostline.rewards.config import RewardEntry
from frostline.runtime.backends import TORCH
from frostline.runtime.runtime import Runtime
from frostline.stages.shapes import ShapeRange
from frostline.train.judging.judge import Judge
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.module import TrainingModule

# Both use pixels only: they have no networks and no stages.
_KINDS = ("sharpness", "motion")


def build_likeness(module: TrainingModule) -> tuple[Judge, ...]:
    """Create the measures of sharpness and motion, without a cache."""
    runtime = Runtime({}, TORCH)
    entries = [RewardEntry.parse({"type": kind}) for kind in _KINDS]
    active = build_rewards(entries, module.model.device, ShapeRange(), JUDGES)
    return tuple(Judge(each, runtime, Conditioner(module.model, runtime, (each,), None)) for each in active)


def likeness(
    measurers: tuple[Judge, ...], known: Collection[str], frames: Tensor, conditioning: Conditioning
) -> dict[str, tuple[Judge, Tensor]]:
    """Measure generated (B, T, 3, H, W) frames in [0, 1] relative to the clips of their samples.

    Args:
        measurers: from `build_likeness`.
        known: names of measures of rewards and judges; a ratio among them is not measured again.
    Returns:
        By name (`sharpness_ratio`, `motion_ratio`): the measurer and the ratios (B,). 1 means equal to the clip; NaN if
        there is no clip, or no motion in it.
    """
    found = {}
    # Relative to the clip, even if a sample has reference pictures.
    of_clips = replace(conditioning, sample=replace(conditioning.sample, reference=()))
    for each in measurers:
        name = f"{each.active.name}_ratio"
        if not any(other.endswith(name) for other in known):
            scored = each.score(frames, of_clips)
            found[name] = (each, torch.where(scored.valid, scored.metrics[f"{each.name}_{name}"], torch.nan))
    return found
