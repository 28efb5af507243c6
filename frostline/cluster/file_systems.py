"""Resolve local paths and the URLs that pyarrow supports (`s3://`, `gs://`, …)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from frostline.errors import ConfigError
from frostline.paths import is_url


def file_system_of(name: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URL, and the path within that file system.

    Raises:
        ConfigError: the URL is invalid, or no file system supports it.
    """
    if not is_url(name):
        return fs.LocalFileSystem(), str(Path(name).absolute())
    try:
        return fs.FileSystem.from_uri(name)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{name}: no file system supports this URL: {error}") from error


def exists(name: str) -> bool:
    """Return whether a file or folder exists.

    Raises:
        ConfigError: the file system cannot be accessed.
    """
    system, path = file_system_of(name)
    try:
        return system.get_file_info(path).type != fs.FileType.NotFound
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{name}: cannot be accessed: {error}") from error
