"""Paths that come out of files: a file may name what lies beside or below it, and nothing else."""

import os
from pathlib import Path

from frostline.errors import DataError


def check_inside(folder: Path, value: str, permission: str, allow_outside: bool = False) -> None:
    """Refuse a path in a file in `folder` that leads out of the folder.

    Judged by the path as written, not by where links lead: a download cache keeps its files as links into a
    common store, and the links are the owner's, while the path comes from the file.

    Args:
        permission: what to say for this to be allowed.
    Raises:
        DataError: it does, or it is no path at all.
    """
    if "\0" in value:
        raise DataError("the path holds a NUL character")
    root, path = (Path(os.path.normpath(part.absolute())) for part in (folder, folder / value))
    if not allow_outside and not path.is_relative_to(root):
        raise DataError(f"{value} lies outside {folder}; {permission} permits that for a file you trust")
