"""How rewards join the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.rewards.active import ActiveReward
from frostline.rewards.reward import RewardScore


@dataclass(frozen=True)
class RewardLoss:
    """What the rewards say together.

    loss: 0-dim with graph. scores: 0-dim without, by reward; each the mean of the samples that count. totals: of each,
    the sum that this process has of it, and over how many samples.
    """

    loss: Tensor
    scores: dict[str, Tensor]
    totals: dict[str, tuple[Tensor, Tensor]]


def reward_loss(
    scores: Sequence[tuple[ActiveReward, RewardScore]], mean_count: Callable[[Tensor], Tensor] = lambda count: count
) -> RewardLoss:
    """The sum of `-(score - baseline) / scale * weight`, each score the mean over the samples that count.

    In the loss, the score of a sample is at most the reward's `cap`; what is reported is the score itself.

    Samples that a reward cannot score count as 0 or not at all, as `on_unscored` says; their gradient is zero either
    way. Without a sample that counts there is no reward: a loss of 0 that is still connected to the graph.

    Args:
        mean_count: from the number of samples that count here to its mean over all processes. Where gradients are
            averaged over processes, each then weighs its samples as one process with all of them would.
    """
    total: Tensor | None = None
    means, totals = {}, {}
    for active, scored in scores:
        config = active.config
        counts = torch.ones_like(scored.valid) if config.on_unscored == "zero" else scored.valid
        everywhere = mean_count(counts.sum().float())
        # The share of this process: 1 on average.
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
