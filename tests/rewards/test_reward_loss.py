"""The sum of rewards, and the share of each process in it."""

from typing import Any

import pytest
import torch
from own_rewards import Brightness, BrightnessConfig

from frostline.rewards.active import ActiveReward
from frostline.rewards.loss import reward_loss
from frostline.rewards.reward import RewardScore


def active(name: str = "one", **settings: Any) -> ActiveReward:
    config = BrightnessConfig(type="own_rewards:Brightness", **settings)
    reward = Brightness(config)
    reward.name = name
    return ActiveReward(reward, config, (), "")


def score(*values: float, valid: list[bool] | None = None) -> RewardScore:
    return RewardScore(torch.tensor(values), torch.tensor(valid or [True] * len(values)))


def test_the_loss_is_the_weighted_sum() -> None:
    first, second = active(baseline=0.4, scale=0.2, weight=3.0), active("two", baseline=0.1, scale=1.0, weight=0.5)
    outcome = reward_loss([(first, score(0.7, 0.3)), (second, score(1.0, 0.2))])
    assert outcome.loss.item() == pytest.approx(-(0.5 - 0.4) / 0.2 * 3 - (0.6 - 0.1) * 0.5)
    assert {name: mean.item() for name, mean in outcome.scores.items()} == pytest.approx({"one": 0.5, "two": 0.6})
    totals = {name: (score.item(), count.item()) for name, (score, count) in outcome.totals.items()}
    assert totals == {"one": (pytest.approx(1.0), 2), "two": (pytest.approx(1.2), 2)}


@pytest.mark.parametrize("on_unscored", ["skip", "zero"])
def test_the_parts_of_two_processes_average_to_the_whole(on_unscored: str) -> None:
    """Make none of the second process's samples valid."""
    reward = active(baseline=0.4, scale=0.2, weight=1.0, on_unscored=on_unscored)
    values, valid = [0.7, 0.3, 0.0, 0.0], [True, True, False, False]
    whole = reward_loss([(reward, score(*values, valid=valid))])
    counts = [2.0, 2.0] if on_unscored == "zero" else [2.0, 0.0]
    mean = torch.tensor(sum(counts) / 2)
    parts = [
        reward_loss([(reward, score(*values[rows], valid=valid[rows]))], lambda count: mean)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(part.loss.item() for part in parts) / 2 == pytest.approx(whole.loss.item())
    assert sum(part.scores["one"].item() for part in parts) / 2 == pytest.approx(whole.scores["one"].item())


def test_above_its_cap_a_score_gains_nothing_more() -> None:
    values = torch.tensor([0.9, 0.3, 0.8], requires_grad=True)
    scored = RewardScore(values, torch.tensor([True, True, False]))
    outcome = reward_loss([(active(baseline=0.1, scale=0.5, weight=2.0, cap=0.6), scored)])
    assert outcome.loss.item() == pytest.approx(-((0.6 + 0.3) / 2 - 0.1) / 0.5 * 2)
    assert outcome.scores["one"].item() == pytest.approx(0.6), "the reported score is not capped"
    (gradient,) = torch.autograd.grad(outcome.loss, values)
    assert gradient.tolist() == pytest.approx([0, -2 / 0.5 / 2, 0])
