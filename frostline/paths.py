"""Paths from outside: a file may name what lies beside or below it and nothing else, and what is read is a file.

What begins with a scheme (`s3://`, `https://`, …) is a URL, of which the same holds.
"""

import os
import posixpath
import re
import stat
from pathlib import Path
from typing import BinaryIO

from frostline.errors import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(name: str) -> bool:
    """Return whether a name has a scheme, and is no local path."""
    return _URL.match(name) is not None


def joined(folder: Path | str, name: str) -> str:
    """Return the path or URL that `name` means in a file in `folder`, which may be a URL, too."""
    if is_url(name):
        return name
    return f"{folder}/{name}" if is_url(str(folder)) else str(Path(folder) / name)


def check_inside(folder: Path | str, value: str, permission: str, allow_outside: bool = False) -> None:
    """Refuse a path in a file in `folder` that leads out of the folder.

    Judged by the path as written, not by where links lead: a download cache keeps its files as links into a
    common store, and the links are the owner's, while the path comes from the file.

    Args:
        permission: what to say for this to be allowed.
    Raises:
        DataError: it does, or it is no path at all.
    """
    check_path(value)
    if not allow_outside and not _is_inside(folder, value):
        raise DataError(f"{value} lies outside {folder}; {permission} permits that for a file you trust")


def _is_inside(folder: Path | str, value: str) -> bool:
    if is_url(str(folder)) or is_url(value):
        root = f"{str(folder).rstrip('/')}/"
        path = joined(folder, value)
        inner = posixpath.normpath(path.removeprefix(root))
        return path.startswith(root) and not value.startswith("/") and inner.split("/")[0] != ".."
    root, path = (Path(os.path.normpath(part.absolute())) for part in (Path(folder), folder / Path(value)))
    return path.is_relative_to(root)


def check_path(value: str) -> None:
    """Refuse what no path can be.

    Raises:
        DataError: it holds a NUL character, or one that no encoding of file names has.
    """
    if "\0" in value:
        raise DataError("the path holds a NUL character")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise DataError("the path holds a character that no file name can have") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be read; nothing else that a path can lead to, least of all a named pipe, which would wait.

    Raises:
        DataError: there is no such file, or it is not a regular one.
        OSError: it cannot be opened.
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
