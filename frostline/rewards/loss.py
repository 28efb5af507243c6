"""Combine rewards into the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.rewards.active import ActiveReward
from frostline.rewards.reward import RewardScore


@dataclass(frozen=True)
class RewardLoss:
    """The combined result of the rewards.

    Attributes:
        loss: 0-dim, with graph.
        scores: 0-dim, without graph, by reward; the mean over the samples that count. With several processes, the
            mean of their values is the mean over all samples that count.
        totals: for each reward, the sum in this process and the number of samples in the sum.
    """

    loss: Tensor
    scores: dict[str, Tensor]
    totals: dict[str, tuple[Tensor, Tensor]]


def reward_loss(
    scores: Sequence[tuple[ActiveReward, RewardScore]], mean_count: Callable[[Tensor], Tensor] = lambda count: count
) -> RewardLoss:
    """Return the sum of `-(score - baseline) / scale * weight`, with each score the mean over the samples that count.

    In the loss, the score of a sample is limited to the reward's `cap`; the reported score is not.

    Samples that a reward cannot score count as 0 or are ignored, depending on `on_unscored`; their gradient is zero in
    both cases. If no sample counts, the loss is 0, but still connected to the graph.

    Args:
        mean_count: maps the number of samples that count in this process to the mean over all processes. If gradients
            are averaged over processes, each process then weights its samples as a single process with all samples
            would.
    """
    total: Tensor | None = None
    means, totals = {}, {}
    for active, scored in scores:
        config = active.config
        counts = torch.ones_like(scored.valid) if config.on_unscored == "zero" else scored.valid
        everywhere = mean_count(counts.sum().float())
        # The fraction for this process: 1 on average.
        share = counts.sum() / everywhere.clamp(min=torch.finfo(torch.float32).tiny)
        score, count = torch.where(counts, scored.score, 0), counts.sum()
        gained = score if config.cap is None else score.clamp(max=config.cap)
        mean = torch.where(counts, gained, 0).sum() / count.clamp(min=1)
        loss = -(mean - config.baseline) / config.scale * config.weight * share
        loss = torch.where(everywhere > 0, loss, 0 * mean)
        total = loss if total is None else total + loss
        means[active.name] = (score.sum() / count.clamp(min=1) * share).detach()
        totals[active.name] = (score.sum().detach(), count)
    assert total is not None
    return RewardLoss(total, means, totals)
