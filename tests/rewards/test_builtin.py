"""A built-in reward is found by the name of its file; there is no other list of rewards."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import frostline.rewards
from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.rewards.config import ClassEntry, RewardEntry, builtin_names, stage_names
from frostline.rewards.face_identity import Config as FaceIdentity
from frostline.train import WanTrainingModule
from frostline.train.config_file import commented_yaml, load_run_settings
from frostline.train.settings import RunSettings

WARMTH = '''
from pydantic import Field

from frostline.rewards.config import RewardConfig
from frostline.rewards.reward import Reward, RewardScore


class Config(RewardConfig):
    """Red rather than blue."""

    red: float = Field(default=1.0, description="weight of red")

    def build(self):
        return Warmth(self)


class Warmth(Reward):
    Config = Config
    name = "warmth"

    def __init__(self, config):
        self.config = config

    def score(self, frames, sample, references, run):
        warmth = self.config.red * frames[:, :, 0].flatten(1).mean(1) - frames[:, :, 2].flatten(1).mean(1)
        return RewardScore(warmth, warmth == warmth)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of rewards that is searched in addition to that of frostline."""
    monkeypatch.setattr(frostline.rewards, "__path__", [*frostline.rewards.__path__, str(tmp_path)])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if name.startswith("frostline.rewards."):
            del sys.modules[name]
            vars(frostline.rewards).pop(name.rpartition(".")[2], None)


@pytest.mark.parametrize("file", ["warmth.py", "warmth/__init__.py"])
def test_a_new_reward_is_a_file_and_nothing_else(
    file: str, folder: Path, make_module: Callable[..., WanTrainingModule]
) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(WARMTH)
    assert {"face_identity", "sharpness", "warmth"} <= {*builtin_names()}
    settings = load_run_settings(None, ["rewards=[{type: warmth, red: 2}]", "rewards.0.weight=1"])
    assert "red: 2.0" in commented_yaml(settings)
    assert RunSettings.parse(settings.model_dump(mode="json")) == settings
    with pytest.raises(ConfigError, match=r"rewards\.0\.rd: unknown setting, did you mean red"):
        load_run_settings(None, ["rewards=[{type: warmth, rd: 2}]"])
    with pytest.raises(ConfigError, match=r"rewards\.0\.type: there is no reward 'warmht', did you mean warmth"):
        load_run_settings(None, ["rewards=[{type: warmht}]"])
    module = make_module(
        num_inference_steps=3,
        grad_start_step=1,
        grad_end_step=2,
        kl_weight=0.0,
        rewards=settings.model_dump()["rewards"],
    )
    clips = held_out_clips(1, seed=1, num_frames=5, size=32)
    loss, warmth, _ = module({"prompt": clips.prompts, "video": clips.video})
    loss.backward()
    assert loss.item() == pytest.approx(-warmth.item())
    assert module.last_metrics is not None
    assert list(module.last_metrics.scores) == ["warmth"]
    assert torch.stack([p.grad.norm() for p in module.trainable_parameters().values() if p.grad is not None]).max() > 0


def test_what_cannot_be_imported_is_told(folder: Path) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\nclass Config(object): ...\n")
    (folder / "other.py").write_text("class Config(object): ...\n")
    with pytest.raises(ConfigError, match=r"rewards\.0\.type: the reward broken cannot be imported: No module named"):
        RunSettings.parse({"rewards": [{"type": "broken"}]})
    with pytest.raises(ConfigError, match=r"rewards\.0\.type: there is no reward 'other'"):
        RunSettings.parse({"rewards": [{"type": "other"}]})


def test_entries_keep_what_is_their_own() -> None:
    values: list[dict[str, Any]] = [
        {"type": "face_identity", "upscale": 2, "weight": 0.5},
        {"type": "sharpness", "floor": 1e-4},
        {"type": "a.b:C", "options": {"x": [1, {"y": None}]}, "baseline": 0.25},
    ]
    settings = RunSettings.parse({"rewards": values})
    dumped = settings.model_dump(mode="json")["rewards"]
    for entry, given in zip(dumped, values, strict=True):
        assert given.items() <= entry.items()
    assert RunSettings.parse({"rewards": dumped}) == settings
    assert RunSettings(rewards=settings.rewards) == settings
    assert [type(entry) for entry in settings.rewards[::2]] == [FaceIdentity, ClassEntry]
    assert settings != RunSettings.parse({"rewards": values[:2]})


def test_stages_are_named_before_anything_is_loaded() -> None:
    faces, own = (RewardEntry.parse({"type": name}) for name in ("face_identity", "a.b:C"))
    assert stage_names([faces]) == ("face_detector", "face_embedder")
    assert stage_names([RewardEntry.parse({"type": "sharpness"})]) == ()
    assert stage_names([faces, own]) is None
