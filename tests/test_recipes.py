"""`frostline init`: recipes and configurations that are installed with the package."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.export.recipe import load_recipe
from frostline.recipes import copy_recipes, export_recipe, recipe_names, training_config
from frostline.rewards.face_identity import Config as FaceIdentityConfig
from frostline.train.config_file import load_run_settings
from frostline.train.settings import RunSettings
from frostline.train.step_settings import TrainingModuleSettings


def test_without_a_name_the_names_are_listed() -> None:
    result = CliRunner().invoke(app, ["init"])
    assert result.exit_code == 0
    assert result.output.split() == recipe_names()
    assert {"tiny", "Wan2.2-I2V-A14B"} <= {*recipe_names()}


def test_both_files_are_copied_and_usable(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", "tiny", str(tmp_path / "mine")])
    assert result.exit_code == 0, result.output
    config, recipe = tmp_path / "mine" / "tiny.yaml", tmp_path / "mine" / "tiny.export.yaml"
    assert {*(tmp_path / "mine").iterdir()} == {config, recipe}
    named_config, named_recipe = training_config("tiny"), export_recipe("tiny")
    assert named_config is not None
    assert named_recipe is not None
    assert load_run_settings(config, []) == load_run_settings(named_config, [])
    assert load_recipe(str(recipe), {}) == load_recipe("tiny", {})


def test_a_model_with_a_recipe_alone_gets_one_file(tmp_path: Path) -> None:
    assert copy_recipes("Wan2.1-T2V-1.3B", tmp_path) == [tmp_path / "Wan2.1-T2V-1.3B.export.yaml"]


def test_the_reference_is_reproduced_with_its_own_constants(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", "reproduce-roll-reward-fl", str(tmp_path)])
    assert result.exit_code == 0, result.output
    settings = load_run_settings(tmp_path / "reproduce-roll-reward-fl.yaml", [])
    (reward,) = settings.rewards
    assert isinstance(reward, FaceIdentityConfig)
    assert (reward.detection_size, reward.channels, reward.baseline, reward.scale) == (640, "bgr", 0.54, 0.16)
    assert reward.detector.endswith("scrfd_10g_bnkps.onnx") and reward.embedder.endswith("glintr100.onnx")
    assert (settings.num_inference_steps, settings.grad_start_step, settings.grad_end_step) == (8, 4, 7)
    assert (settings.data.num_frames, settings.noise_seed, settings.train.lr_scheduler_type) == (81, 24, "constant")
    # The settings of a step are the defaults.
    step = TrainingModuleSettings.model_fields.keys() - {"rewards", "lora", "boundary"}
    assert settings.model_dump(include=step) == RunSettings().model_dump(include=step)
    assert (settings.lora.rank, settings.lora.alpha) == (32, 32)


@pytest.mark.parametrize("name", [name for name in recipe_names() if training_config(name) is not None])
def test_every_training_configuration_has_a_judge(name: str) -> None:
    """Validation samples show whether the reward rises, but only a judge shows whether this is an improvement."""
    config = training_config(name)
    assert config is not None
    settings = load_run_settings(config, [])
    assert settings.validation.source is not None
    assert settings.validation.judges


def test_files_that_exist_are_kept(tmp_path: Path) -> None:
    (tmp_path / "tiny.export.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"tiny\.export\.yaml exists already"):
        copy_recipes("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.export.yaml"]
    assert (tmp_path / "tiny.export.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", ["Wan9", "../export/tiny", "", "train/tiny"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe"):
        copy_recipes(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
