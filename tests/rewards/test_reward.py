"""Rewards of frostline and of users: made from settings, several in one step, and classes that are refused."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.rewards.active import RewardStages
from frostline.rewards.build import build_rewards, check_rewards, resolve
from frostline.rewards.config import RewardEntry
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.sharpness import Config as SharpnessConfig
from frostline.runtime.runtime import Runtime
from frostline.stages.shapes import ShapeRange
from frostline.train import WanTrainingModule

MakeModule = Callable[..., WanTrainingModule]
QUICK: dict[str, Any] = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}
SHARPNESS = {"type": "sharpness", "scale": 2.0, "weight": 0.5}
BRIGHTNESS = {"type": "own_rewards:Brightness"}


def entries(*rewards: dict[str, Any]) -> list[RewardEntry]:
    return [RewardEntry.parse(values) for values in rewards]


def test_sharpness_is_best_at_the_references_own() -> None:
    reward, run = SharpnessConfig().build(), RewardStages(Runtime({}), ())
    video = held_out_clips(2, seed=0, num_frames=5).video
    sample = RewardInputs(("", ""), video, (5, 5))
    references = reward.references(sample, run)
    assert reward.score(video, sample, references, run).score.abs().max() == 0
    blurred = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 3, 1, 1).unflatten(0, video.shape[:2])
    blurred.requires_grad_()
    scored = reward.score(blurred, sample, references, run)
    assert scored.score.max() < -0.5
    assert scored.metrics["sharpness_ratio"].max() < 1
    (gradient,) = torch.autograd.grad(scored.score.sum(), blurred)
    assert gradient[:, 0].abs().max() == 0, "the first frame is given, so it has no gradient"
    with torch.no_grad():
        assert (reward.score(blurred + 10 * gradient, sample, references, run).score > scored.score).all()


def test_a_step_with_three_rewards(make_module: MakeModule) -> None:
    own = {**BRIGHTNESS, "options": {"offset": 0.5}, "weight": 2.0, "scale": 1.0}
    module = make_module(kl_weight=0.0, rewards=[{"type": "face_identity", "weight": 0.0}, SHARPNESS, own], **QUICK)
    clips = held_out_clips(2, seed=1, num_frames=5, size=32)
    data = {"prompt": clips.prompts, "video": clips.video}
    loss, first, _ = module(data)
    metrics = module.last_metrics
    assert metrics is not None
    assert list(metrics.scores) == ["face_score", "sharpness", "brightness"]
    scores = {name: score / max(1, count) for name, (score, count) in metrics.scores.items()}
    assert first.item() == pytest.approx(scores["face_score"])
    assert {"detection_rate", "sharpness_ratio", "brightness"} <= metrics.per_sample.keys()
    assert "face_embedder_live" in metrics.stages
    expected = -scores["sharpness"] / 2 * 0.5 - scores["brightness"] * 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.trainable_parameters().values())
    assert module.parts.cache is not None
    hits = module.parts.cache.hits
    again, _, _ = module(data)
    assert again.item() == loss.item()
    assert module.parts.cache.hits == hits + 10, "context, image and three references of two samples"


def test_defaults_are_the_classs_own_where_the_settings_say_nothing() -> None:
    own, said = resolve(entries(BRIGHTNESS, {**BRIGHTNESS, "scale": 2.0, "options": {"offset": 1}}))
    assert (own.scale, own.weight, own.model_dump()["offset"]) == (4.0, 0.1, 0.0)
    assert (said.scale, said.weight, said.model_dump()["offset"]) == (2.0, 0.1, 1.0)


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no module": ([{"type": "no.such.module:Class"}], "no.such.module cannot be imported"),
    "no class": ([{"type": "frostline.rewards.sharpness:Sharpnes"}], "has no class 'Sharpnes'"),
    "a function": ([{"type": "frostline.rewards.loss:reward_loss"}], "has no class"),
    "no config": (
        [{"type": "own_rewards:NoConfig"}],
        "rewards.0 own_rewards:NoConfig: is not a reward, it has no Config",
    ),
    "no reward": ([{"type": "own_rewards:NoReward"}], "is not a reward, it has no 'unscored': inherit from"),
    "an option too many": (
        [SHARPNESS, {**BRIGHTNESS, "options": {"ofset": 1}}],
        "rewards.1.options (own_rewards:Brightness): ofset: unknown setting, did you mean offset?",
    ),
    "an option of another type": (
        [{**BRIGHTNESS, "options": {"offset": "1"}}],
        "offset: Input should be a valid",
    ),
    "an option too few": (
        [{"type": "own_rewards:Likeness"}],
        "rewards.0.options (own_rewards:Likeness): seed: Field",
    ),
    "what is no option": (
        [{**BRIGHTNESS, "options": {"weight": 1}}],
        "rewards.0.options.weight: move this setting",
    ),
    "a class that refuses": (
        [{**BRIGHTNESS, "options": {"offset": 2}}],
        "cannot be created from its Config: an off",
    ),
    "one name twice": ([SHARPNESS, SHARPNESS], "rewards: two entries have the name 'sharpness'"),
    "faces twice": (
        [{"type": "face_identity"}, {"type": "face_identity", "detector": "yunet"}],
        "rewards: two entries have the name 'face_score'",
    ),
    "code for a path": ([{"type": "os; import sys:exit"}], "must be package.module:Class"),
    "an undeclared stage": (
        [{"type": "own_rewards:Undeclared"}],
        "its stages (features) differ from those in uses of its Config (none)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_reward_is_refused(name: str) -> None:
    values, said = BAD[name]
    with pytest.raises(ConfigError) as caught:
        build_rewards(entries(*values), "cpu", ShapeRange())
    assert said in str(caught.value)
    if name != "an undeclared stage":
        with pytest.raises(ConfigError) as before:
            check_rewards(entries(*values), runs=True)
        assert str(before.value) == str(caught.value)


def test_a_class_that_was_edited_recalls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache key of the references also depends on the source of the class."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number in (1, 22, 22):
        source = (
            "from frostline.rewards.config import RewardConfig\n"
            "from frostline.rewards.reward import Reward\n"
            "class Own(Reward):\n"
            f"    Config, name, number = RewardConfig, 'own', {number}\n"
            "    def __init__(self, config): pass\n"
        )
        (tmp_path / "own_reward.py").write_text(source)
        sys.modules.pop("own_reward", None)
        importlib.invalidate_caches()
        (own,) = build_rewards(entries({"type": "own_reward:Own"}), "cpu", ShapeRange())
        keys.append(own.references_key)
    sys.modules.pop("own_reward")
    assert keys[0] != keys[1] == keys[2]


def test_what_weighs_a_score_says_nothing_of_the_references() -> None:
    def key(**changes: Any) -> str:
        (active,) = build_rewards(entries({"type": "sharpness", **changes}), "cpu", ShapeRange())
        return active.references_key

    assert key() == key(weight=3.0, baseline=1.0, scale=2.0, on_unscored="zero") != key(floor=1e-3)


def test_references_are_the_same_under_autocast(make_module: MakeModule) -> None:
    """Fill the cache with the same values in a step in bf16 and in a validation."""
    module = make_module(cache_bytes=0, rewards=[SHARPNESS], **QUICK)
    clips = held_out_clips(1, seed=1, num_frames=5, size=32)
    data = {"prompt": clips.prompts, "video": clips.video}
    plain = module.forward_preprocess(data).references[0]
    with torch.autocast("cpu", torch.bfloat16):
        within = module.forward_preprocess(data).references[0]
    assert plain.keys() == within.keys() != set()
    assert all(torch.equal(plain[name], within[name]) for name in plain)


def test_a_reward_may_keep_nothing_and_look_at_the_video(make_module: MakeModule, tmp_path: Path) -> None:
    clips = held_out_clips(2, seed=1, num_frames=5, size=32)
    data = {"prompt": clips.prompts, "video": clips.video, "valid_frames": [3, 5]}
    scores = []
    for folder in (tmp_path, tmp_path, None):
        module = make_module(cache_dir=folder, rewards=[{"type": "own_rewards:Unsaid"}], **QUICK)
        conditioning = module.forward_preprocess(data)
        ((_, score),) = module.score(clips.video, conditioning)
        scores.append(score.score)
    expected = clips.video[0].mean() - clips.video[0, :3].mean()
    torch.testing.assert_close(scores[0][0], expected)
    assert scores[0][1].abs() < 1e-6
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_a_reward_runs_its_own_stages_alone(make_module: MakeModule) -> None:
    module = make_module(rewards=[{"type": "own_rewards:Curious"}], **QUICK)
    clips = held_out_clips(1, seed=1, num_frames=5, size=32)
    with pytest.raises(ConfigError, match="can only run its own stages: it requested 'vae_encoder', but has none"):
        module.forward_preprocess({"prompt": clips.prompts, "video": clips.video})


def test_a_score_of_all_videos_together_is_none(make_module: MakeModule) -> None:
    module = make_module(rewards=[{"type": "own_rewards:OfAllTogether"}], **QUICK)
    clips = held_out_clips(2, seed=1, num_frames=5, size=32)
    with pytest.raises(
        ConfigError, match=r"the reward brightness returns score of shape \(\) for 2 videos, not \(2,\)"
    ):
        module({"prompt": clips.prompts, "video": clips.video})
