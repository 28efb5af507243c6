"""The result of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from frostline.rewards.active import ActiveReward
from frostline.rewards.loss import RewardLoss
from frostline.rewards.reward import RewardScore
from frostline.runtime.stage_timer import StageTime
from frostline.train.step.rollout import Sampled


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step.

    Attributes:
        sample_id: names of the samples.
        per_sample: by name, the score of every reward (`face_score`, …) and its further metrics (`detection_rate`,
            `face_score_missing_zero`, …) for each sample.
        scores: for each reward, the sum over the samples that count, and their number.
        kl: KL term of each live step that was compared with the model without LoRA, by step.
        kl_weight: weight of the mean KL term in the loss.
        sft_loss: flow-matching loss of the data's own clips; None if it is not part of the loss.
        stages: time and backend of each use of a stage: by the name of a frozen stage, or `denoise_tail`,
            `vae_decoder_live`, `face_embedder_live` for live uses.
    """

    sample_id: tuple[str, ...]
    per_sample: dict[str, list[float]]
    scores: dict[str, tuple[float, int]]
    kl: dict[int, float]
    kl_weight: float
    sft_loss: float | None
    stages: dict[str, StageTime]


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Attributes:
        loss: 0-dim with graph.
        score: score of the first reward, 0-dim without graph.
        kl_loss: mean KL term of the live steps, 0-dim without graph.
    """

    loss: Tensor
    score: Tensor
    kl_loss: Tensor
    metrics: StepMetrics


def step_result(
    sample_id: tuple[str, ...],
    scores: Sequence[tuple[ActiveReward, RewardScore]],
    reward: RewardLoss,
    sampled: Sampled,
    kl_weight: float,
    sft: tuple[float, Tensor] | None,
    stages: Mapping[str, StageTime],
) -> StepResult:
    """Return the loss with the metrics of its parts: `reward.loss + kl_weight * kl_loss + sft_weight * sft_loss`.

    Args:
        sft: weight and value of the flow-matching loss, if used.
    """
    per_sample = {}
    for active, score in scores:
        named = {active.name: score.score, **score.metrics}
        per_sample |= {name: values.tolist() for name, values in named.items()}
    metrics = StepMetrics(
        sample_id=sample_id,
        per_sample=per_sample,
        scores={name: (total.item(), int(count)) for name, (total, count) in reward.totals.items()},
        kl={step: term.item() for step, term in sampled.kl.items()},
        kl_weight=kl_weight,
        sft_loss=None if sft is None else sft[1].item(),
        stages=dict(stages),
    )
    loss = reward.loss + kl_weight * sampled.kl_loss
    if sft is not None:
        loss = loss + sft[0] * sft[1]
    return StepResult(loss, next(iter(reward.scores.values())), sampled.kl_loss.detach(), metrics)
