"""Group the weight files of a folder into networks of one or several shards, and check that none is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from frostline.errors import ConfigError

from .settings_files import read_json
from .tensor_files import read_header

SUFFIXES = (".safetensors", ".pth")
# The number is at the end or before the variant: `…-00001-of-00002.fp16.safetensors`.
_SHARD = re.compile(r"(.*-)\d{5}(-of-(\d{5})(?:\.[\w-]+)?\.(?:safetensors|pth))")


def shard_groups(folder: Path) -> list[tuple[Path, ...]]:
    """Return the weight files of a folder, grouped by network.

    Hidden files are skipped: macOS creates one (`._name`) for each file that it copies.

    Raises:
        ConfigError: a shard or one of its tensors is missing; otherwise the result could look like a model with fewer
            blocks.
    """
    visible = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    groups: list[tuple[Path, ...]] = []
    taken: set[Path] = set()
    for index in visible:
        if re.fullmatch(r".*\.safetensors\.index(\.[\w-]+)?\.json", index.name):
            groups.append(_indexed(index))
            taken.update(groups[-1])
    for path in visible:
        if path.suffix in SUFFIXES and path not in taken:
            groups.append(_numbered(path))
            taken.update(groups[-1])
    return groups


def check_all_listed(paths: Sequence[Path]) -> None:
    """Check that the list contains all shards of each network.

    Raises:
        ConfigError: a shard is missing.
    """
    listed = {path.name for path in paths}
    for path in paths:
        for name in _names(path):
            if name not in listed:
                raise ConfigError(f"incomplete: {path} is one of several shards, but {name} is not in the list")


def _indexed(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{index} contains no weight_map")
    shards = sorted(set(names.values()))
    for shard in shards:
        # Paths in an index must stay inside its folder.
        if Path(shard).name != shard:
            raise ConfigError(f"{index} names {shard}, which is not a file in the same folder")
        if not (index.parent / shard).is_file():
            raise ConfigError(f"incomplete: {index.parent / shard} is missing; {index.name} lists it")
    paths = tuple(index.parent / shard for shard in shards)
    found = {name for path in paths for name in read_header(path).tensors}
    if missing := [name for name in names if name not in found]:
        raise ConfigError(
            f"incomplete: {index} lists {len(missing)} tensors that are in no shard, the first is {missing[0]}"
        )
    return paths


def _numbered(path: Path) -> tuple[Path, ...]:
    shards = tuple(path.with_name(name) for name in _names(path)) or (path,)
    for shard in shards:
        if not shard.is_file():
            raise ConfigError(f"incomplete: {shard} is missing")
    return shards


def _names(path: Path) -> list[str]:
    """Return the names of all shards in the group of `path`; empty if it is not a shard.

    Raises:
        ConfigError: its number is larger than the number of shards.
    """
    of_many = _SHARD.fullmatch(path.name)
    if of_many is None:
        return []
    head, tail, count = of_many.groups()
    names = [f"{head}{number:05d}{tail}" for number in range(1, int(count) + 1)]
    if path.name not in names:
        raise ConfigError(f"{path} is not one of {int(count)} shards numbered from 1")
    return names
