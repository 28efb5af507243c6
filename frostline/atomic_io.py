"""Files that appear only whole, are on disk before they are named, and are known by their digest."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from frostline.errors import DataError


def check_writable(path: Path) -> None:
    """Look whether `atomic_write` could write there, before the work whose result it is to take.

    Raises:
        DataError: it could not; names the file and says why.
    """
    if path.is_dir():
        raise DataError(f"{path}: cannot be written: it is a folder")
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise DataError(f"{path}: cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{path}: cannot be written: {folder} may not be written to")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it is renamed to `path` when the block ends well, else removed.

    It starts as an empty file, and ends with the mode of any new file there (the umask, or the folder's default ACL),
    whatever the writer made of it: safetensors puts a file of mode 0600 in its place.

    Raises:
        DataError: the file cannot be written; names it and says why.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:  # some file systems know no modes, and refuse to set one
            part.chmod(mode)
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # nothing was written where its folder is a file
            part.unlink()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk: a rename must not be there before what it names.

    Raises:
        OSError: the disk is full, or it is no file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits, read in chunks.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
