"""Paths and URLs of tables: what pyarrow has a file system for (`s3://`, `gs://`, …), and local paths."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from frostline.errors import ConfigError
from frostline.paths import is_url


def file_system_of(name: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises:
        ConfigError: there is none for it.
    """
    if not is_url(name):
        return fs.LocalFileSystem(), str(Path(name).absolute())
    try:
        return fs.FileSystem.from_uri(name)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{name}: no file system can be opened for it: {error}") from error


def exists(name: str) -> bool:
    """Return whether there is a file or folder.

    Raises:
        ConfigError: it cannot be told.
    """
    system, path = file_system_of(name)
    try:
        return system.get_file_info(path).type != fs.FileType.NotFound
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{name}: cannot be looked at: {error}") from error
