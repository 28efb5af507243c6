"""`frostline export --reward`: the stages of rewards, with or without a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vision_files import write_clip

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.export.recipe import Recipe, reward_recipe
from frostline.rewards.argument import parse_rewards
from frostline.runtime.engines.store import EngineStore


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("frostline.export.model.load_staged_model", load)


def test_stages_of_rewards_are_built_without_a_model(no_model: None, tmp_path: Path) -> None:
    """Build, list and find the engines by the files of the reward, without those of a model."""
    write_clip(tmp_path / "clip")
    arguments = ["export", "--reward", f"clip:{tmp_path / 'clip'}", "--engines-dir", str(tmp_path / "engines")]
    arguments += ["--backend", "onnxruntime", "--device", "cpu", "--jobs", "1"]
    for status in ("built", "present"):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        for stage in ("clip_image", "clip_text"):
            (line,) = [line for line in result.stdout.splitlines() if stage in line]
            assert status in line
    records = [record.manifest for record in EngineStore(tmp_path / "engines").find()]
    assert sorted(manifest.stage for manifest in records if manifest and manifest.verified) == [
        "clip_image",
        "clip_text",
    ]


def test_with_a_model_its_stages_are_named_too(no_model: None, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: tiny\nstages: face_embedder\n")
    arguments = ["export", str(tmp_path / "recipe.yaml"), "--reward", "sharpness,face_identity", "--dry-run"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "face_embedder" in result.stdout and "planned" in result.stdout and "face_detector" not in result.stdout


def test_recipes_of_rewards_alone() -> None:
    recipe = reward_recipe(parse_rewards(["face_identity"]), {"backends": None})
    assert recipe.of_rewards_alone and recipe.stages == ("face_detector", "face_embedder")
    assert reward_recipe(parse_rewards(["face_identity"]), {"stages": "face_embedder"}).stages == ("face_embedder",)
    assert Recipe(model="tiny", stages=("face_detector",)).of_rewards_alone
    assert not Recipe(model="tiny").of_rewards_alone
    with pytest.raises(
        ConfigError, match="there is no stage 'vae_encoder'; valid stages: face_detector, face_embedder"
    ):
        reward_recipe(parse_rewards(["face_identity"]), {"stages": "vae_encoder"})
    with pytest.raises(ConfigError, match="these rewards have no stages"):
        reward_recipe(parse_rewards(["sharpness"]), {})
    with pytest.raises(ConfigError, match="model is empty: set stages"):
        Recipe.parse({"model": ""})


def test_nothing_named_is_refused(refused_usage: Callable[..., str]) -> None:
    assert "nothing to export" in refused_usage("export")
