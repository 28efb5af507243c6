"""Rewards: what one is, how it is found by name, and how several join the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from frostline.config import RewardSettings, RewardTerm
from frostline.errors import ConfigError
from frostline.rewards.reward_class import import_reward
from frostline.runtime.cache import content_key
from frostline.runtime.identity.computation import computation_id


@dataclass(frozen=True, eq=False)
class RewardScore:
    """What a reward says of B generated videos.

    score: (B,) with graph; 0 with zero gradient where `valid` is False. valid: (B,) bool, whether there was anything
    to score. metrics: further figures of each video, (B,) without graph, by name.
    """

    score: Tensor
    valid: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Scores generated videos; see `frostline.rewards.sharpness` for a short one."""

    name: str
    """What logs call its score."""

    def references(self, video: Tensor) -> Mapping[str, Tensor]:
        """What to know of (B, T, 3, H, W) reference videos in [0, 1]: tensors of B rows, computed once and cached.

        T may be less than the generated videos have: a clip that was padded is given without its padding.
        """
        ...

    def score(self, frames: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """The score of generated (B, T, 3, H, W) frames in [0, 1], differentiable to them."""
        ...


@dataclass(frozen=True)
class ActiveReward:
    """A reward with its part in the loss.

    references_key: what its references depend on beside the video; stages: beside it and the weights of these.
    """

    reward: Reward
    settings: RewardTerm
    references_key: str
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardLoss:
    """What the rewards say together.

    loss: 0-dim with graph. scores: 0-dim without, by reward; each the mean of the samples that count. totals: of each,
    the sum that this process has of it, and over how many samples.
    """

    loss: Tensor
    scores: dict[str, Tensor]
    totals: dict[str, tuple[Tensor, Tensor]]


def build_rewards(
    settings: RewardSettings, face_identity: Callable[[RewardTerm], ActiveReward], device: torch.device
) -> tuple[ActiveReward, ...]:
    """All rewards of the settings.

    Args:
        face_identity: makes that reward, which runs on stages.
    Raises:
        ConfigError: a class cannot be found or made, or two rewards go by one name.
    """
    rewards = tuple(
        face_identity(term) if term.is_face_identity else _custom_reward(term, device) for term in settings.terms
    )
    names = [active.reward.name for active in rewards]
    if len(set(names)) < len(names):
        raise ConfigError(f"reward: two rewards go by one name: {', '.join(names)}")
    return rewards


def reward_loss(
    scores: Sequence[tuple[ActiveReward, RewardScore]], mean_count: Callable[[Tensor], Tensor] = lambda count: count
) -> RewardLoss:
    """The sum of `-(score - baseline) / scale * weight`, each score the mean over the samples that count.

    Samples that a reward cannot score count as 0 or not at all, as `on_no_face` says; their gradient is zero either
    way. Without a sample that counts there is no reward: a loss of 0 that still hangs on the graph.

    Args:
        mean_count: from the number of samples that count here to its mean over all processes. Where gradients are
            averaged over processes, each then weighs its samples as one process with all of them would.
    """
    total: Tensor | None = None
    means, totals = {}, {}
    for active, scored in scores:
        settings = active.settings
        counts = torch.ones_like(scored.valid) if settings.on_no_face == "zero" else scored.valid
        everywhere = mean_count(counts.sum().float())
        # The share of this process: 1 on average.
        share = counts.sum() / everywhere.clamp(min=torch.finfo(torch.float32).tiny)
        score = torch.where(counts, scored.score, 0).sum()
        mean = score / counts.sum().clamp(min=1)
        loss = -(mean - settings.baseline) / settings.scale * settings.weight * share
        loss = torch.where(everywhere > 0, loss, 0 * mean)
        total = loss if total is None else total + loss
        means[active.reward.name] = (mean * share).detach()
        totals[active.reward.name] = (score.detach(), counts.sum())
    assert total is not None
    return RewardLoss(total, means, totals)


def _custom_reward(term: RewardTerm, device: torch.device) -> ActiveReward:
    make = import_reward(term.type)
    try:
        reward = make(**term.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward.type {term.type}: cannot be made with options {term.options}: {error}") from error
    for name in ("name", "references", "score"):
        if not hasattr(reward, name):
            raise ConfigError(f"reward.type {term.type}: is no reward, it has no {name!r} (see ARCHITECTURE.md)")
    if isinstance(reward, nn.Module):
        reward.to(device).eval().requires_grad_(False)
    code = computation_id([make.__module__], source_of=[make.__module__.partition(".")[0]])
    key = content_key(type=term.type, options=term.options, computation=code, state=_state(reward))
    return ActiveReward(cast(Reward, reward), term, key)


def _state(reward: object) -> dict[str, Tensor]:
    """The tensors of a reward, and of networks that it has as attributes."""
    parts = {"": reward, **vars(reward)}
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    state = {f"{name}.{key}": value for name, part in networks.items() for key, value in part.state_dict().items()}
    return {name: value for name, value in {**parts, **state}.items() if isinstance(value, Tensor)}
