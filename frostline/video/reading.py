"""Read videos and pictures: completely, frame by frame, or only their description."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av.error
import numpy as np
import torch

from frostline.allocation import is_out_of_memory
from frostline.errors import ConfigError, DataError
from frostline.paths import open_regular

from .containers import Container, opened_container, reason_of
from .info import VideoInfo
from .pictures import HEAD_BYTES, Picture, opened_picture, picture_format

logger = logging.getLogger(__name__)

# Common other files, by their first bytes.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML file",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF document",
    b"8bps": "a Photoshop document",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cjxl ": "a JPEG XL picture",
    b"\0\0\0\x0cjp  ": "a JPEG 2000 picture",
}
_MAX_VIDEO_PIXELS = 2**32
"""Maximum size of all frames that are read at once: 12 GiB."""


def read_video(path: str | Path, max_frames: int | None = None, stride: int = 1) -> torch.Tensor:
    """Read frames 0, stride, 2*stride, … (at most `max_frames`) as uint8 `(T, 3, H, W)`, RGB, upright.

    Lost frames of a damaged file are logged.

    Raises:
        ConfigError: `max_frames` or `stride` is less than 1.
        DataError: the file cannot be read, its frames differ in size, or they do not fit into memory.
    """
    path = Path(path)
    arrays: list[np.ndarray] = []
    for _, picture in equal_frames(path, max_frames, stride):
        arrays.append(picture)
        if len(arrays) * picture.size > 3 * _MAX_VIDEO_PIXELS:
            raise DataError(f"{path}: too long to be read at once: set max_frames, or use stream_video")
    try:
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError if it cannot allocate memory
        if is_out_of_memory(error):
            raise DataError(f"{path}: its {len(arrays)} frames do not fit into memory") from error
        raise


def stream_video(
    path: str | Path,
    max_frames: int | None = None,
    stride: int = 1,
    warn: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames of `read_video` one after the other, as (number in the file, uint8 `(H, W, 3)`).

    Only one frame is in memory at a time, and frames may differ in size. Frames that cannot be decoded are skipped.

    Args:
        warn: called with each warning: lost frames, or which of several streams or pictures is used. By default, each
            warning is logged once per process.
    Raises:
        ConfigError: `max_frames` or `stride` is less than 1.
        DataError: the file cannot be read.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ConfigError(f"max_frames and stride must be at least 1, not {max_frames} and {stride}")
    path = Path(path)
    warn = warn or functools.partial(_warn_once, path)
    with _opened(path) as source:
        for count, (number, picture) in enumerate(source.frames(stride), 1):
            yield number, picture
            if count == max_frames:
                break
        for note in (*source.notes, *source.losses()):
            warn(note)


def equal_frames(
    path: Path, max_frames: int | None = None, stride: int = 1, warn: Callable[[str], None] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames of `stream_video`, which must all have the same size.

    Raises:
        ConfigError: `max_frames` or `stride` is less than 1.
        DataError: sizes differ, or the file cannot be read.
    """
    first: tuple[int, ...] | None = None
    for number, picture in stream_video(path, max_frames, stride, warn):
        first = first or picture.shape
        if picture.shape != first:
            raise DataError(
                f"{path}: frames differ in size: frame 0 is {first[1]}x{first[0]}, frame {number} is "
                f"{picture.shape[1]}x{picture.shape[0]}"
            )
        yield number, picture


def probe_video(path: str | Path) -> VideoInfo:
    """Describe a file. Decodes the first frame, so if no error is raised, the file can be read.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(Path(path)) as source:
        return source.info()


def count_frames(path: str | Path, limit: int) -> int:
    """Count the frames of a file, up to `limit`, without decoding them.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(Path(path)) as source:
        return source.count(limit)


@contextmanager
def _opened(path: Path) -> Iterator[Picture | Container]:
    """Open a file of any format; convert all errors to a DataError that names the file."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            if not head:
                raise DataError(f"{path}: the file is empty (0 bytes)")
            if other := next((what for start, what in _OTHERS.items() if head.lower().startswith(start)), ""):
                raise DataError(f"{path}: cannot be read as a video: it is {other}")
            kind = picture_format(head, path)
            with opened_container(file, path) if kind is None else opened_picture(file, path, kind) as source:
                yield source
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory for its frames") from error
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a video: {reason_of(error)}") from error


@functools.cache
def _warn_once(path: Path, reason: str) -> None:
    logger.warning("%s: %s", path, reason)
