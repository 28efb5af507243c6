"""Generate the configuration reference from the settings classes.

python docs/make_reference.py           # print it
python docs/make_reference.py --write   # write docs/configuration.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from frostline.config import BaseAdapter, Settings, nested_settings
from frostline.export.recipe import Recipe
from frostline.rewards.config import RewardConfig, builtin_names, entry_class
from frostline.score.settings import ScoreSettings
from frostline.train.sample_settings import SampleSettings
from frostline.train.settings import RunSettings
from frostline.train.step_settings import TrainingModuleSettings

PAGE = Path(__file__).parent / "configuration.md"
_INTRODUCTION = """# Configuration reference

All settings, generated from the settings classes by `python docs/make_reference.py --write`.
`frostline train --print-config` prints the settings of a training run with their defaults as a YAML file.

Rules for all files and overrides:

- Unknown keys are refused; the message names the nearest valid key.
- Types are checked strictly: `yes` is not a number, and `8.0` is not an integer.
- `null` in the column *values* means that the setting may be left empty. A section whose keys are all commented out
  has its defaults.
- An override on the command line is `section.name=value`; entries of a list are counted from 0: `rewards.0.weight=0.2`.
- `~` at the beginning of a path is the home folder. Relative paths are relative to the working directory.
"""
_BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))
_TYPES = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", Path: "path"}


def main() -> None:
    """Print the reference, or write it to its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")


def reference() -> str:
    """Return the page as Markdown."""
    of_step = TrainingModuleSettings.model_fields
    common = [name for name in RewardConfig.model_fields if name != "type"]
    parts = [
        _INTRODUCTION,
        "## Training run\n\nThe YAML file of `frostline train` and `frostline cache`.\n",
        _table(RunSettings, [name for name in _plain_names(RunSettings) if name not in of_step]),
        "### Training step\n\nThese settings, `backprop`, `decode`, `rollout` and `lora` are also keyword arguments of "
        "`WanTrainingModule.from_pretrained`.\n",
        _table(RunSettings, [name for name in _plain_names(RunSettings) if name in of_step]),
        *_sections(RunSettings),
        _section("base_adapters", BaseAdapter, level=3),
        "## Rewards\n\nAn entry of `rewards` or `validation.judges`. Each has a `type` and these settings. If a reward "
        "has another default, its table lists it.\n",
        _table(RewardConfig, common),
        *_rewards(common),
        "## Export recipe\n\nThe YAML file of `frostline export`.\n",
        _table(Recipe, list(Recipe.model_fields)),
        "## Scoring\n\nSettings of `frostline score`, each an option of the command.\n",
        _table(ScoreSettings, list(ScoreSettings.model_fields)),
        "## Sampling\n\nSettings of `frostline sample`, each an option of the command.\n",
        _table(SampleSettings, list(SampleSettings.model_fields)),
    ]
    return "\n".join(parts)


def _plain_names(settings: type[Settings]) -> list[str]:
    """Return the fields that are not sections."""
    return [name for name in settings.model_fields if not _is_section(settings, name)]


def _is_section(settings: type[Settings], name: str) -> bool:
    annotation = settings.model_fields[name].annotation
    return isinstance(annotation, type) and nested_settings(settings, name) is not None


def _sections(settings: type[Settings]) -> Iterator[str]:
    for name in settings.model_fields:
        nested = nested_settings(settings, name)
        if nested is not None and _is_section(settings, name):
            yield _section(name, nested, level=3)


def _section(name: str, settings: type[Settings], level: int) -> str:
    summary = (settings.__doc__ or "").strip().splitlines()[0]
    return f"{'#' * level} `{name}`\n\n{summary}\n\n{_table(settings, list(settings.model_fields))}"


def _rewards(common: Sequence[str]) -> Iterator[str]:
    for name in builtin_names():
        config = entry_class(name)
        # The fields of this reward, and those common fields that have a different default.
        fields = [
            field
            for field, info in config.model_fields.items()
            if field != "type" and (field not in common or info.default != RewardConfig.model_fields[field].default)
        ]
        heading = f"### Reward `{name}`\n\nSee [its page](rewards/{name}.md).\n"
        yield f"{heading}\n{_table(config, fields)}" if fields else heading


def _table(settings: type[Settings], names: Sequence[str]) -> str:
    rows = [_row(name, settings.model_fields[name]) for name in names]
    lines = [("setting", "values", "default", "meaning"), ("---", "---", "---", "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    bounds = " and ".join(
        f"{sign} {_number(getattr(bound, attribute))}"
        for kind, attribute, sign in _BOUNDS
        for bound in field.metadata
        if isinstance(bound, kind)
    )
    values = f"{_values(field.annotation)}{f' {bounds}' if bounds else ''}"
    if NoneType in get_args(field.annotation):
        values += ", or `null`"
    default = "required" if field.is_required() else f"`{_default(field)}`"
    if field.default is None and NoneType not in get_args(field.annotation):
        default = "computed"
    return f"`{name}`", values, default, (field.description or "").replace("|", r"\|").replace("\n", " ")


def _values(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_values(arguments[0]).replace('integer', 'integers').replace('mapping', 'mappings')}"
    if origin is dict:
        return "mapping"
    if arguments and origin is not None and origin.__name__ == "Annotated":
        return _values(arguments[0])
    if arguments:  # a union
        return ", ".join(_values(part) for part in arguments if part is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "mapping"
    return _TYPES.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and value and isinstance(value[0], Settings):
        return json.dumps([entry.model_dump(mode="json", exclude_unset=True) for entry in value], ensure_ascii=False)
    if isinstance(value, Settings):
        return json.dumps(value.model_dump(mode="json"), ensure_ascii=False)
    if isinstance(value, tuple):
        value = list(value)
    text = str(value) if isinstance(value, Path) else json.dumps(value, ensure_ascii=False)
    return text.strip('"') or '""'


def _number(value: float) -> str:
    return f"{value:g}"


if __name__ == "__main__":
    main()
