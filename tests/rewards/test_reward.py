"""Rewards: the sum of several, the part of each process, the shipped second one, and classes that are none."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.config import RewardSettings, RewardTerm
from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.rewards.reward import ActiveReward, RewardScore, build_rewards, reward_loss
from frostline.rewards.sharpness import SharpnessReward
from frostline.train.step.module import WanTrainingModule

MakeModule = Callable[..., WanTrainingModule]
QUICK: dict[str, Any] = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}
SHARPNESS = {"type": "frostline.rewards.sharpness:SharpnessReward", "baseline": 0.0, "scale": 2.0, "weight": 0.5}


class Brightness:
    """A reward of a user's own, named by tests as `test_reward:Brightness`."""

    name = "brightness"

    def __init__(self, offset: float = 0.0, darkest: float = 0.0) -> None:
        self.offset, self.darkest = offset, darkest

    def references(self, video: Tensor) -> Mapping[str, Tensor]:
        return {"brightness": video.flatten(1).mean(dim=1)}

    def score(self, frames: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Of a video whose reference is darker than that there is nothing to say."""
        mean = frames.flatten(1).mean(dim=1) + self.offset
        return RewardScore(mean, references["brightness"] >= self.darkest)


class NoReward:
    pass


def active(name: str = "one", **settings: Any) -> ActiveReward:
    reward = Brightness()
    reward.name = name
    return ActiveReward(reward, RewardTerm(type="a.b:C", **settings), "")


def score(*values: float, valid: list[bool] | None = None) -> RewardScore:
    return RewardScore(torch.tensor(values), torch.tensor(valid or [True] * len(values)))


def test_the_loss_is_the_weighted_sum() -> None:
    first, second = active(baseline=0.4, scale=0.2, weight=3.0), active("two", baseline=0.1, scale=1.0, weight=0.5)
    outcome = reward_loss([(first, score(0.7, 0.3)), (second, score(1.0, 0.2))])
    assert outcome.loss.item() == pytest.approx(-(0.5 - 0.4) / 0.2 * 3 - (0.6 - 0.1) * 0.5)
    assert {name: mean.item() for name, mean in outcome.scores.items()} == pytest.approx({"one": 0.5, "two": 0.6})
    totals = {name: (score.item(), count.item()) for name, (score, count) in outcome.totals.items()}
    assert totals == {"one": (pytest.approx(1.0), 2), "two": (pytest.approx(1.2), 2)}


@pytest.mark.parametrize("on_no_face", ["skip", "zero"])
def test_the_parts_of_two_processes_average_to_the_whole(on_no_face: str) -> None:
    """Of the second process's samples, none can be scored."""
    reward = active(baseline=0.4, scale=0.2, weight=1.0, on_no_face=on_no_face)
    values, valid = [0.7, 0.3, 0.0, 0.0], [True, True, False, False]
    whole = reward_loss([(reward, score(*values, valid=valid))])
    counts = [2.0, 2.0] if on_no_face == "zero" else [2.0, 0.0]
    mean = torch.tensor(sum(counts) / 2)
    parts = [
        reward_loss([(reward, score(*values[rows], valid=valid[rows]))], lambda count: mean)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(part.loss.item() for part in parts) / 2 == pytest.approx(whole.loss.item())
    assert sum(part.scores["one"].item() for part in parts) / 2 == pytest.approx(whole.scores["one"].item())


def test_sharpness_is_best_at_the_references_own() -> None:
    reward = SharpnessReward()
    video = held_out_clips(2, seed=0, num_frames=5).video
    references = reward.references(video)
    assert reward.score(video, references).score.abs().max() == 0
    blurred = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 3, 1, 1).unflatten(0, video.shape[:2])
    blurred.requires_grad_()
    scored = reward.score(blurred, references)
    assert scored.score.max() < -0.5
    assert scored.metrics["sharpness_ratio"].max() < 1
    (gradient,) = torch.autograd.grad(scored.score.sum(), blurred)
    assert gradient[:, 0].abs().max() == 0, "the first frame is given"
    with torch.no_grad():
        assert (reward.score(blurred + 10 * gradient, references).score > scored.score).all()


def test_a_step_with_three_rewards(make_module: MakeModule) -> None:
    own = {"type": "test_reward:Brightness", "options": {"offset": 0.5}, "weight": 2.0, "baseline": 0.0, "scale": 1.0}
    module = make_module(kl_weight=0.0, reward={"weight": 0.0, "plus": [SHARPNESS, own]}, **QUICK)
    clips = held_out_clips(2, seed=1, num_frames=5, size=32)
    data = {"prompt": clips.prompts, "video": clips.video}
    loss, first, _ = module(data)
    metrics = module.last_metrics
    assert metrics is not None
    assert list(metrics.scores) == ["face_score", "sharpness", "brightness"]
    scores = {name: score / max(1, count) for name, (score, count) in metrics.scores.items()}
    assert first.item() == pytest.approx(scores["face_score"])
    assert {"detection_rate", "sharpness_ratio", "brightness"} <= metrics.per_sample.keys()
    expected = -scores["sharpness"] / 2 * 0.5 - scores["brightness"] * 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.trainable_parameters().values())
    assert module.cache is not None
    hits = module.cache.hits
    again, _, _ = module(data)
    assert again.item() == loss.item()
    assert module.cache.hits == hits + 10, "context, image and three references of two samples"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no colon": ({"type": "sharpness"}, "must be face_identity or package.module:Class"),
    "no module": ({"type": "no.such.module:Class"}, "no.such.module cannot be imported"),
    "no class": ({"type": "frostline.rewards.sharpness:Sharpnes"}, "has no class 'Sharpnes'"),
    "a function": ({"type": "frostline.rewards.reward:reward_loss"}, "has no class"),
    "no reward": ({"type": "test_reward:NoReward"}, "is no reward, it has no 'name'"),
    "an option too many": ({"type": "test_reward:Brightness", "options": {"x": 1}}, "cannot be made with options"),
    "a bad option": ({**SHARPNESS, "options": {"floor": 0}}, "floor of the sharpness reward must be above 0"),
    "one name twice": ({**SHARPNESS, "plus": [SHARPNESS]}, "two rewards go by one name"),
    "code for a path": ({"type": "os; import sys:exit"}, "must be face_identity or package.module:Class"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_reward_is_refused(name: str) -> None:
    values, said = BAD[name]

    def faces(term: RewardTerm) -> ActiveReward:
        raise AssertionError("no faces here")

    with pytest.raises(ConfigError) as caught:
        build_rewards(RewardSettings.parse(values), faces, torch.device("cpu"))
    assert said in str(caught.value)


def test_a_class_that_was_edited_recalls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it made of the references is cached by its source, too."""
    monkeypatch.syspath_prepend(tmp_path)
    keys, faces = [], active
    for number in (1, 22, 22):
        body = f"    name, references, score = 'own', None, {number}\n"
        (tmp_path / "own_reward.py").write_text(f"class Own:\n{body}")
        sys.modules.pop("own_reward", None)
        importlib.invalidate_caches()
        (own,) = build_rewards(RewardSettings(type="own_reward:Own"), lambda term: faces(), torch.device("cpu"))
        keys.append(own.references_key)
    sys.modules.pop("own_reward")
    assert keys[0] != keys[1] == keys[2]


def test_references_are_the_same_under_autocast(make_module: MakeModule) -> None:
    """Whoever comes first, a step in bf16 or a validation, fills the cache."""
    module = make_module(cache_bytes=0, reward=SHARPNESS, **QUICK)
    clips = held_out_clips(1, seed=1, num_frames=5, size=32)
    data = {"prompt": clips.prompts, "video": clips.video}
    plain = module.forward_preprocess(data).references[0]
    with torch.autocast("cpu", torch.bfloat16):
        within = module.forward_preprocess(data).references[0]
    assert plain.keys() == within.keys() != set()
    assert all(torch.equal(plain[name], within[name]) for name in plain)
