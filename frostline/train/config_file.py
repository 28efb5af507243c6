"""Configuration files of `frostline train`: YAML, dotted overrides, and the output of `--print-config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from frostline.config import Settings
from frostline.documents import parse_value, read_yaml
from frostline.errors import ConfigError, DocumentError
from frostline.train.settings import RunSettings

_COMMENT_COLUMN = 46
_MAX_DEPTH = 20


def load_run_settings(path: Path | None, overrides: Sequence[str] = ()) -> RunSettings:
    """Return the settings in a YAML file, or the defaults, with `section.name=value` overrides applied.

    Raises:
        ConfigError: the file, a key or a value is invalid; the message names it and the nearest valid key.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        _apply(values, override, RunSettings)
    try:
        return RunSettings.parse(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path is not None else str(error)) from None


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Return plain values that `RunSettings.parse` accepts."""
    return settings.model_dump(mode="json")


def commented_yaml(settings: Settings) -> str:
    """Return all settings as valid YAML, each with its description as a comment."""
    return "\n".join(_lines(settings, 0)) + "\n"


def _lines(settings: BaseModel, depth: int) -> Iterator[str]:
    pad = "  " * depth
    nested: dict[str, BaseModel] = {}
    lists: dict[str, tuple[BaseModel, ...]] = {}
    # Fields of subclasses come first, so that the model and the output folder are before the details of a step. A field
    # that decides which other fields exist comes before all of them.
    own = {"type", *type(settings).__annotations__}
    fields = type(settings).model_fields
    for name in sorted(fields, key=lambda name: name not in own):
        field, value = fields[name], getattr(settings, name)
        if isinstance(value, BaseModel):
            nested[name] = value
            continue
        if isinstance(value, tuple) and value and all(isinstance(entry, BaseModel) for entry in value):
            lists[name] = value
            continue
        line = f"{pad}{name}: {_flow(settings.model_dump(mode='json')[name])}"
        yield f"{line:<{_COMMENT_COLUMN}}  # {field.description}"
    for name, value in nested.items():
        yield ""
        summary = next(iter((type(value).__doc__ or "").strip().splitlines()), "")
        yield f"{pad}{name}:  # {summary}"
        yield from _lines(value, depth + 1)
    for name, entries in lists.items():
        yield ""
        yield f"{pad}{name}:  # {fields[name].description}"
        for entry in entries:
            first, *rest = _lines(entry, depth + 2)
            yield f"{pad}  - {first.lstrip()}"
            yield from rest


def _flow(value: Any) -> str:
    """Format a value as JSON, which is valid YAML; write `1e-08` as `1.0e-08`, because YAML 1.1 reads it as text."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return repr(value) if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
    return json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise ConfigError(f"{path}: {error}") from error
    if values is None:  # all of it is commented out
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of settings, not {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str, settings: type[Settings]) -> None:
    """Set one `section.name=value` in nested mappings (and lists, by number); the value is parsed as YAML."""
    name, equals, text = override.partition("=")
    where = f"override {override if len(override) < 80 else override[:80] + '…'!r}"
    if not equals or not name.strip():
        raise ConfigError(f"{where}: must be section.name=value, for example train.learning_rate=1e-5")
    try:
        value = parse_value(text)
    except DocumentError as error:
        raise ConfigError(f"{where}: the value {error}") from error
    *parents, last = name.strip().split(".")
    if len(parents) > _MAX_DEPTH:
        raise ConfigError(f"{where}: there is no setting {len(parents)} sections deep")
    place: Any = values
    for depth, parent in enumerate(parents):
        if isinstance(place, dict):
            if place.get(parent) is None:
                place[parent] = _default_list(settings, parent) if depth == 0 else {}
            place = place[parent]
        elif isinstance(place, list):
            place = place[_index(place, parent, where)]
        else:
            raise ConfigError(f"{where}: the setting before {parent} is not a section")
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list):
        place[_index(place, last, where)] = value
    else:
        raise ConfigError(f"{where}: {name.rpartition('.')[0]} is not a section")


def _default_list(settings: type[Settings], name: str) -> Any:
    """Return the initial value for an override in `name`: its default list of sections, or a new section."""
    field = settings.model_fields.get(name)
    default = None if field is None else field.get_default(call_default_factory=True)
    if not isinstance(default, tuple):
        return {}
    return [entry.model_dump(mode="json", exclude_unset=True) for entry in default if isinstance(entry, BaseModel)]


def _index(values: list[Any], text: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(values):
        raise ConfigError(f"{where}: {text} is not the index of one of the {len(values)} entries, counted from 0")
    return int(text)
