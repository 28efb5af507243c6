"""Parse rewards from the command line, `--reward face_identity,clip:DIR`, and from files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError
from frostline.rewards.config import RewardEntry, builtin_names, entry_class

_EXAMPLE = "such as face_identity, clip:FOLDER or package.module:Class"


def parse_rewards(arguments: Iterable[str]) -> tuple[RewardEntry, ...]:
    """Parse the values of an option that may be given several times, each of them comma-separated.

    `NAME` is a built-in reward, `NAME:WEIGHTS` a built-in reward with its setting `weights`, and any other
    `package.module:Class` a user's class. A reward with more settings, or with a comma in its path, must be given in a
    file: see `read_rewards`.

    Raises:
        ConfigError: there is no such reward, or its weights are invalid.
    """
    parts = [part.strip() for argument in arguments for part in argument.split(",")]
    if not all(parts):
        raise ConfigError(f"--reward: empty name before or after a comma: name rewards, {_EXAMPLE}")
    return tuple(_parse(part) for part in parts)


def read_rewards(path: Path) -> tuple[RewardEntry, ...]:
    """Read a YAML or JSON file: a list of rewards, or a training configuration, of which only `rewards` is read.

    Raises:
        ConfigError: the file cannot be read, has no list of rewards, or an entry is invalid.
    """
    # Imported here, because the command line imports this module and should not import PyYAML.
    from frostline.documents import read_named_yaml

    document = read_named_yaml(path, f"{path}:")
    entries = document.get("rewards") if isinstance(document, dict) else document
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: must be a list of rewards, or a mapping that contains one as `rewards`")
    return tuple(_entry(entry, f"{path}, rewards.{number}") for number, entry in enumerate(entries))


def _parse(text: str) -> RewardEntry:
    where = f"--reward {text}"
    name, colon, weights = text.partition(":")
    if not colon or name not in builtin_names():
        return _entry({"type": text}, where)
    if "weights" not in entry_class(name).model_fields:
        raise ConfigError(f"{where}: the reward {name} has no setting weights: use {name}")
    if not weights:
        raise ConfigError(f"{where}: no weights are given after the colon")
    return _entry({"type": name, "weights": str(Path(weights).expanduser())}, where)


def _entry(values: Any, where: str) -> RewardEntry:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping with a type, {_EXAMPLE}")
    try:
        return RewardEntry.for_values(values).parse(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
