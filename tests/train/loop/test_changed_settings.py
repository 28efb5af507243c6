"""What a resumed run reports about changed settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from frostline.train.config_file import dump_settings
from frostline.train.flatten import flatten
from frostline.train.loop.resume import changed_settings
from frostline.train.loop.run_dir import CONFIG
from frostline.train.settings import RunSettings

FACES = {"type": "face_identity"}
SHARPNESS = {"type": "sharpness"}


def changed(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[object, object]]:
    (folder / CONFIG).write_text(json.dumps(dump_settings(RunSettings.parse(before))))
    checkpoint: Any = SimpleNamespace(path=folder)
    return changed_settings(checkpoint, RunSettings.parse(now))


def test_one_setting_of_one_reward(tmp_path: Path) -> None:
    rewards = [FACES, {**SHARPNESS, "weight": 0.5}]
    before, now = {"rewards": [FACES, SHARPNESS], "shift": 3.0}, {"rewards": rewards, "output_dir": "elsewhere"}
    assert changed(tmp_path, before, now) == {"shift": (3.0, 5.0), "rewards.1.weight": (0.1, 0.5)}
    assert changed(tmp_path, now, now) == {}


def test_a_reward_that_came_or_went(tmp_path: Path) -> None:
    one, both = {"rewards": [FACES]}, {"rewards": [FACES, SHARPNESS]}
    came = changed(tmp_path, one, both)
    assert came["rewards.1.type"] == (None, "sharpness")
    entry = dump_settings(RunSettings.parse(both))["rewards"][1]
    assert {*came} == {f"rewards.1.{name}" for name, value in entry.items() if value is not None}
    assert changed(tmp_path, both, one) == {name: (now, before) for name, (before, now) in came.items()}


def test_another_type_of_reward(tmp_path: Path) -> None:
    found = changed(tmp_path, {"rewards": [FACES]}, {"rewards": [SHARPNESS]})
    assert found["rewards.0.type"] == ("face_identity", "sharpness")
    assert found["rewards.0.detector"] == ("mtcnn", None)
    assert found["rewards.0.floor"] == (None, 1e-6)
    assert "rewards.0.weight" not in found


def test_a_setting_that_is_newer_than_the_checkpoint_has_not_changed(tmp_path: Path) -> None:
    settings = RunSettings()
    saved = dump_settings(settings)
    del saved["engine_forward"], saved["rewards"][0]["face"]
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    checkpoint: Any = SimpleNamespace(path=tmp_path)
    assert changed_settings(checkpoint, settings) == {}


def test_lists_of_plain_values_stay_as_they_are() -> None:
    values = {"a": [1, {"b": 2}], "c": [{"d": [{"e": 1}, {}]}], "f": []}
    assert flatten(values, "/") == {"a": [1, {"b": 2}], "c/0/d/0/e": 1, "f": []}
