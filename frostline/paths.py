"""Check untrusted paths and URLs: they must stay inside their folder, and paths must name regular files."""

import os
import posixpath
import re
import stat
from pathlib import Path
from typing import BinaryIO

from frostline.errors import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(name: str) -> bool:
    """Return whether a name starts with a scheme (`s3://`, `https://`, …)."""
    return _URL.match(name) is not None


def joined(folder: Path | str, name: str) -> str:
    """Return the path or URL that `name` refers to in a file of `folder`; `folder` may be a URL."""
    if is_url(name):
        return name
    return f"{folder}/{name}" if is_url(str(folder)) else str(Path(folder) / name)


def check_inside(folder: Path | str, value: str, permission: str, allow_outside: bool = False) -> None:
    """Check that a path or URL from a file in `folder` does not lead out of `folder`.

    The path is checked as written, without resolving links: download caches keep their files as links into a common
    store. The user created the links; the path comes from the file.

    Args:
        permission: the option that allows other paths, for the error message.
    Raises:
        DataError: the path leads out of `folder`, or is invalid.
    """
    check_path(value)
    if not allow_outside and not _is_inside(folder, value):
        raise DataError(f"{value} is outside {folder}; {permission} permits that for a file you trust")


def _is_inside(folder: Path | str, value: str) -> bool:
    if is_url(str(folder)) or is_url(value):
        root = f"{str(folder).rstrip('/')}/"
        path = joined(folder, value)
        inner = posixpath.normpath(path.removeprefix(root))
        return path.startswith(root) and not value.startswith("/") and inner.split("/")[0] != ".."
    root, path = (Path(os.path.normpath(part.absolute())) for part in (Path(folder), folder / Path(value)))
    return path.is_relative_to(root)


def check_path(value: str) -> None:
    """Check that a path contains valid characters only.

    Raises:
        DataError: the path contains a NUL character or one that file names cannot encode.
    """
    if "\0" in value:
        raise DataError("the path contains a NUL character")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise DataError("the path contains a character that file names cannot have") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; reject all other kinds, such as a named pipe, which would block.

    Raises:
        DataError: the path is invalid (see `check_path`), or the file does not exist or is not a regular file.
        OSError: the file cannot be opened.
    """
    check_path(str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")
