"""Configuration files of `frostline train`: YAML, dotted overrides, and the page that `--print-config` shows."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from frostline.config import Settings
from frostline.errors import ConfigError
from frostline.train.settings import RunSettings

_COMMENT_COLUMN = 46


def load_run_settings(path: Path | None, overrides: Sequence[str] = ()) -> RunSettings:
    """The settings in a YAML file, or the defaults, with `section.name=value` overrides put over them.

    Raises:
        ConfigError: the file, a key or a value is not usable; names it, and the nearest known key.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        _apply(values, override)
    try:
        return RunSettings.parse(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path is not None else str(error)) from None


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Plain values, as `RunSettings.parse` takes them again."""
    return settings.model_dump(mode="json")


def commented_yaml(settings: Settings) -> str:
    """All settings as YAML that can be read again, each with what it means beside it."""
    return "\n".join(_lines(settings, 0)) + "\n"


def _lines(settings: BaseModel, depth: int) -> Iterator[str]:
    pad = "  " * depth
    nested = {}
    # What a class adds to its base comes first: the model and the folder of a run before the details of its step.
    own = type(settings).__annotations__
    fields = type(settings).model_fields
    for name in sorted(fields, key=lambda name: name not in own):
        field, value = fields[name], getattr(settings, name)
        if isinstance(value, BaseModel):
            nested[name] = value
            continue
        line = f"{pad}{name}: {_flow(settings.model_dump(mode='json')[name])}"
        yield f"{line:<{_COMMENT_COLUMN}}  # {field.description}"
    for name, value in nested.items():
        yield ""
        summary = next(iter((type(value).__doc__ or "").strip().splitlines()), "")
        yield f"{pad}{name}:  # {summary}"
        yield from _lines(value, depth + 1)


def _flow(value: Any) -> str:
    """JSON is YAML, but for `1e-08`, which YAML 1.1 takes for text."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return repr(value) if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
    return json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of settings, not {type(values).__name__}")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key that stands twice is an error: plain YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one `section.name=value` into nested mappings (and lists, by number); the value is read as YAML."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"override {override!r}: must be section.name=value, e.g. train.learning_rate=1e-5")
    try:
        value = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value cannot be read as YAML") from error
    *parents, last = name.strip().split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, dict):
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
        elif isinstance(place, list):
            place = place[_index(place, parent, override)]
        else:
            raise ConfigError(f"override {override!r}: {parent} lies in no section")
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list):
        place[_index(place, last, override)] = value
    else:
        raise ConfigError(f"override {override!r}: {name.rpartition('.')[0]} is no section")


def _index(values: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(values):
        raise ConfigError(f"override {override!r}: {text} is none of the {len(values)} entries, counted from 0")
    return int(text)
