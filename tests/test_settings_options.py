"""Each field of the settings has an option with its name, default, limits and description."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import Field, field_validator
from typer.testing import CliRunner, Result

from frostline.cli import app, exporting, scoring, training
from frostline.cli.lazy_options import with_options
from frostline.cli.settings_options import takes_changes, takes_settings
from frostline.config import Settings, nested_settings
from frostline.errors import ConfigError
from frostline.export.recipe import Recipe
from frostline.score.settings import ScoreSettings
from frostline.train.sample_settings import SampleSettings

OTHER_FLAGS = {"backends": "--backend", "compute_capabilities": "--compute-capability", "engines": "--engines-dir"}


def options(command: Callable[..., None]) -> Mapping[str, Any]:
    """Return the options that Typer creates from a command's parameters."""
    one = typer.Typer()
    one.command()(with_options(command))
    return {str(option.name): option for option in typer.main.get_command(one).params}


@pytest.mark.parametrize(
    ("command", "settings", "own"),
    [
        (scoring.score, ScoreSettings, {"rewards"}),
        # The command has its own option for base adapters.
        (training.sample, SampleSettings, {"base_adapters"}),
        # `model` may also name a recipe; the command has its own options for the LoRA and the rewards.
        (exporting.export, Recipe, {"model", "base_adapters", "lora", "rewards"}),
    ],
    ids=["score", "sample", "export"],
)
def test_every_field_is_an_option(command: Callable[..., None], settings: type[Settings], own: set[str]) -> None:
    found, written = options(command), inspect.signature(inspect.unwrap(command)).parameters
    for name, field in settings.model_fields.items():
        if name in own:
            continue
        assert name not in written, f"{name} is written by hand"
        option = found[name]
        assert str(field.description).lower() in option.help.lower()
        if option.param_type_name == "option":
            assert option.opts == [OTHER_FLAGS.get(name, f"--{name.replace('_', '-')}")]
        assert option.required is field.is_required() or command is exporting.export
        if command is exporting.export:
            # The default is the value of the recipe.
            assert option.default is None
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            assert option.show_default == (shown or True)
        elif not field.is_required():
            assert option.default == field.default
    assert {name for name in settings.model_fields if nested_settings(settings, name)} <= own


class More(ScoreSettings):
    """Settings with one field of each kind that an option supports."""

    number: float = Field(default=0.5, ge=0, le=1, description="share of something")
    above_zero: float = Field(default=1.0, gt=0, description="scale of something")
    folder: Path | None = Field(default=None, description="folder of something")
    switch: bool = Field(default=False, description="do something")
    switched_on: bool = Field(default=True, description="do something else")
    words: tuple[str, ...] = Field(default=("a", "b"), description="names of things")
    choice: Literal["one", "two"] = Field(default="one", description="which of two")
    needed: str = Field(description="something that has no default")

    @field_validator("words", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value


def run(*arguments: str, given: list[Any] | None = None) -> Result:
    """Run a command with the options of `More` and one argument; append the values that it received to `given`."""

    def command(*, count: int = 3, settings: More) -> None:
        (given if given is not None else []).append((count, settings))

    one = typer.Typer()
    one.command()(takes_settings(More, argument="needed", flags={"folder": "--dir"})(command))
    return CliRunner().invoke(one, [*arguments], env={"COLUMNS": "200"})


def test_a_field_of_a_subclass_is_an_option_too() -> None:
    given: list[Any] = []
    assert run("word", given=given).exit_code == 0
    (count, settings), *_ = given
    assert (count, settings.needed, settings.number, settings.switched_on, settings.folder) == (
        3,
        "word",
        0.5,
        True,
        None,
    )
    arguments = ["--number", "1", "--dir", "there", "--switch", "--no-switched-on", "--choice", "two", "--every", "2"]
    arguments += ["--words", "x,y"]
    assert run("word", *arguments, "--count", "4", given=given).exit_code == 0
    count, settings = given[-1]
    assert (count, settings.number, settings.folder, settings.switch) == (4, 1.0, Path("there"), True)
    assert (settings.switched_on, settings.choice, settings.every) == (False, "two", 2)
    assert settings.words == ("x", "y")
    shown = run("--help").output
    for words in (
        "--switched-on",
        "--no-switched-on",
        "one|two",
        "Which of two.",
        "[default: 0.5]",
        "0<=x<=1",
        "--count",
    ):
        assert words in shown
    assert "--no-switch " not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--number", "2"), "--number"), (("--every", "x"), "--every"), (("--count", "x"), "--count")],
)
def test_what_is_no_value_of_an_option_is_told_by_its_flag(arguments: tuple[str, ...], said: str) -> None:
    result = run("word", *arguments)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--choice", "three"), "choice: Input should be 'one' or 'two'"),
        (("--above-zero", "0"), "above_zero: Input should be greater than 0"),
        (("--above-zero", "nan"), "above_zero: Input should be a finite number"),
    ],
)
def test_values_go_through_the_settings(arguments: tuple[str, ...], said: str) -> None:
    error = run("word", *arguments).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)


def test_changes_are_none_unless_given() -> None:
    given: list[dict[str, Any]] = []

    def command(*, changes: dict[str, Any]) -> None:
        given.append(changes)

    one = typer.Typer()
    one.command()(takes_changes(More, {"words", "switch", "switched_on", "needed"})(command))
    assert CliRunner().invoke(one, []).exit_code == 0
    assert CliRunner().invoke(one, ["--words", "x,y", "--no-switch", "--switched-on", "--needed", "z"]).exit_code == 0
    changes = {"switch": False, "switched_on": True, "words": "x,y", "needed": "z"}
    assert given == [dict.fromkeys(changes), changes]
    assert CliRunner().invoke(one, ["--number", "1"]).exit_code == 2
    assert "Names of things; comma-separated." in CliRunner().invoke(one, ["--help"], env={"COLUMNS": "200"}).output


def test_a_field_that_can_be_no_option_is_named() -> None:
    class Undescribed(Settings):
        silent: int = 1

    class Mixed(Settings):
        either: int | str = Field(default=1, description="a number or a word")

    for settings, name in ((Undescribed, "silent"), (Mixed, "either")):
        with pytest.raises(TypeError, match=f"{name}: an option needs a description and one type"):
            takes_settings(settings)


def test_the_whole_program_has_these_options() -> None:
    shown = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"}).output
    assert "--max-pixels" in shown and "fp32|fp16|bf16" in shown
