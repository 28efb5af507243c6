"""Write files atomically, flush them to disk, and compute their digests."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from frostline.errors import DataError


def check_writable(path: Path) -> None:
    """Check that `atomic_write` can write to `path`, before expensive work starts.

    Raises:
        DataError: `path` cannot be written; the message names the file and the reason.
    """
    if path.is_dir():
        raise DataError(f"{path}: cannot be written: it is a folder")
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise DataError(f"{path}: cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{path}: cannot be written: no permission to write to {folder}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path in the same folder; rename it to `path` if the block succeeds, delete it otherwise.

    The temporary file is created empty. The final file has the mode of any new file in that folder (the umask, or the
    folder's default ACL), even if the writer changed the mode: safetensors creates its file with mode 0600.

    Raises:
        DataError: the file cannot be written; the message names the file and the reason.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:  # some file systems do not support modes and refuse to set one
            part.chmod(mode)
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # nothing was written if the parent path is a file
            part.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that a rename is never stored before the renamed content.

    Raises:
        OSError: the disk is full, or `path` is neither a file nor a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits. The file is read in chunks.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
