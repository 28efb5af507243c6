"""What a training step returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.rewards.active import ActiveReward
from frostline.rewards.loss import RewardLoss
from frostline.rewards.reward import RewardScore
from frostline.runtime.stage_timer import StageTime


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured.

    sample_id: names of the samples.
    per_sample: what the rewards measured of each, by name: every reward's score (`face_score`, …) and its further
        metrics (`detection_rate`, `face_score_missing_zero`, …).
    scores: of each reward, the sum over the samples that count, and how many those are.
    kl: of each tail step.
    stages: time in each use of a stage and its backend: by the stage's name where it is frozen, and of live uses by
        `denoise_tail`, `vae_decoder_live`, `face_embedder_live`.
    """

    sample_id: tuple[str, ...]
    per_sample: dict[str, list[float]]
    scores: dict[str, tuple[float, int]]
    kl: list[float]
    stages: dict[str, StageTime]


@dataclass(frozen=True)
class StepResult:
    """One step.

    loss: 0-dim with graph. score: of the first reward, kl_loss: mean of the tail's KL terms; 0-dim without graph.
    """

    loss: Tensor
    score: Tensor
    kl_loss: Tensor
    metrics: StepMetrics


def step_result(
    sample_id: tuple[str, ...],
    scores: Sequence[tuple[ActiveReward, RewardScore]],
    reward: RewardLoss,
    kl: Sequence[Tensor],
    kl_weight: float,
    stages: Mapping[str, StageTime],
) -> StepResult:
    """Return the loss, `reward.loss + kl_weight * mean(kl)`, with the metrics of its parts."""
    kl_terms = torch.stack([*kl])
    kl_loss = kl_terms.mean()
    per_sample = {}
    for active, score in scores:
        named = {active.name: score.score, **score.metrics}
        per_sample |= {name: values.tolist() for name, values in named.items()}
    metrics = StepMetrics(
        sample_id=sample_id,
        per_sample=per_sample,
        scores={name: (total.item(), int(count)) for name, (total, count) in reward.totals.items()},
        kl=kl_terms.tolist(),
        stages=dict(stages),
    )
    return StepResult(reward.loss + kl_weight * kl_loss, next(iter(reward.scores.values())), kl_loss.detach(), metrics)
