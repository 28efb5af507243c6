"""Rewards as they are named on the command line and in files."""

from pathlib import Path

import pytest

from frostline.errors import ConfigError
from frostline.rewards.argument import parse_rewards, read_rewards
from frostline.rewards.config import ClassEntry
from frostline.rewards.face_identity import Config as FaceIdentityConfig


def test_names_weights_and_classes() -> None:
    entries = parse_rewards(["face_identity, clip:some/folder", "own_rewards:Brightness"])
    assert [entry.type for entry in entries] == ["face_identity", "clip", "own_rewards:Brightness"]
    assert isinstance(entries[0], FaceIdentityConfig) and isinstance(entries[2], ClassEntry)
    assert entries[1].model_dump(include={"weights"}) == {"weights": Path("some/folder")}
    (at_home,) = parse_rewards(["clip:~/clip"])
    assert at_home.model_dump(include={"weights"}) == {"weights": Path.home() / "clip"}
    assert parse_rewards([]) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty name"),
        ("sharpness,,clip:x", "empty name"),
        ("sharpnes", "did you mean sharpness?"),
        ("sharpness:x", "the reward sharpness has no setting weights"),
        ("clip:", "no weights are given"),
    ],
)
def test_what_names_no_reward_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_rewards([text])


def test_a_file_has_all_settings(tmp_path: Path) -> None:
    file = tmp_path / "rewards.yaml"
    for text in ("- {type: sharpness, floor: 0.5}\n", "lora: {rank: 8}\nrewards:\n- {type: sharpness, floor: 0.5}\n"):
        file.write_text(text)
        (entry,) = read_rewards(file)
        assert entry.model_dump(include={"type", "floor"}) == {"type": "sharpness", "floor": 0.5}
    file.write_text('[{"type": "own_rewards:Likeness", "options": {"seed": 3}}]')
    assert read_rewards(file)[0].model_dump()["options"] == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewards: []", "must be a list of rewards"),
        ("{type: sharpness}", "must be a list of rewards"),
        ("- sharpness", r"rewards\.0: must be a mapping with a type"),
        ("- {type: sharpness, flor: 1}", r"rewards\.0: flor: unknown setting, did you mean floor"),
        ("- [", "cannot be read: it"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_rewards(tmp_path / "rewards.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_rewards(tmp_path / "absent.yaml")
