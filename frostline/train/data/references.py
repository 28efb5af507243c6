"""Reference pictures of a sample: files and folders as one tensor, of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from frostline.allocation import is_out_of_memory
from frostline.errors import DataError
from frostline.train.data.batch import SMALLEST_SIDE, resize
from frostline.train.data.cutting import crop_to
from frostline.video import MEDIA_SUFFIXES, count_frames, probe_video, stream_video

MAX_PICTURES = 16
"""Of a sample: of more pictures, or of a video, so many are taken, evenly spaced."""
MAX_SIDE = 1024
"""Pixels of height and width, to which larger pictures are shrunk."""
MAX_VIDEO_FRAMES = 480
"""Frames of a reference video among which the pictures are chosen: 20 seconds at 24 frames per second."""


def read_references(paths: Sequence[Path], warn: Callable[[str], None]) -> torch.Tensor:
    """Read pictures, videos and folders of them as one float32 tensor (R, 3, h, w) in [0, 1].

    Of n files, each gives at most `MAX_PICTURES // n` frames, at least one, evenly spaced among its first
    `MAX_VIDEO_FRAMES`; of more than `MAX_PICTURES` files so many are read, evenly spaced in their order.

    Pictures larger than `MAX_SIDE` are shrunk. Where they differ in size, h and w are the largest height and width
    among them: each is enlarged to fit inside, keeping its proportions, and its border is repeated around it.

    Args:
        warn: told what was left out, and what was lost of a damaged file.
    Raises:
        DataError: a file cannot be read, a folder has no pictures, a picture is too small, or they do not fit into
            memory.
    """
    try:
        files = _chosen_files(paths, warn)
        most = max(1, MAX_PICTURES // len(files))
        pictures = [picture for file in files for picture in _read_file(file, most, warn)]
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
        return torch.stack([_fitted(picture, height, width) for picture in pictures])
    except (MemoryError, RuntimeError) as error:  # the latter is torch's
        if is_out_of_memory(error):
            raise DataError(f"{', '.join(map(str, paths))}: the reference pictures do not fit into memory") from error
        raise


def check_references(paths: Sequence[Path], deep: bool) -> None:
    """Open every file and decode its first frame, or, with `deep`, everything that `read_references` would.

    Raises:
        DataError: as `read_references` does.
    """
    if deep:
        read_references(paths, lambda note: None)
        return
    for file in _chosen_files(paths, lambda note: None):
        info = probe_video(file)
        _check_side(file, info.height, info.width)


def _chosen_files(paths: Sequence[Path], warn: Callable[[str], None]) -> list[Path]:
    files = [file for path in paths for file in (_files_of_folder(path) if path.is_dir() else [path])]
    if len(files) <= MAX_PICTURES:
        return files
    warn(f"{MAX_PICTURES} of its {len(files)} reference pictures are used, evenly spaced")
    return [files[index * len(files) // MAX_PICTURES] for index in range(MAX_PICTURES)]


def _files_of_folder(folder: Path) -> list[Path]:
    """The pictures and videos of a folder, by their names; what is hidden, and folders in it, are left out."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    files = [path for path in entries if path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise DataError(f"{folder}: the folder contains no pictures")
    return files


def _read_file(file: Path, most: int, warn: Callable[[str], None]) -> list[torch.Tensor]:
    """Return at most `most` frames of a file, (3, h, w) each; one frame at a time is in memory at its own size."""
    count = max(1, count_frames(file, MAX_VIDEO_FRAMES))
    stride = -(-count // most)
    frames = stream_video(file, -(-count // stride), stride, lambda note: warn(f"{file}: {note}"))
    return [_shrunk(file, pixels) for _, pixels in frames]


def _shrunk(file: Path, pixels: np.ndarray) -> torch.Tensor:
    height, width = pixels.shape[:2]
    _check_side(file, height, width)
    scale = min(1.0, MAX_SIDE / max(height, width))
    size = (max(SMALLEST_SIDE, round(height * scale)), max(SMALLEST_SIDE, round(width * scale)))
    return crop_to(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]


def _check_side(file: Path, height: int, width: int) -> None:
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(f"{file}: a picture of {width}x{height} is too small: each side needs {SMALLEST_SIDE} pixels")


def _fitted(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3, h, w) enlarged to fit inside (height, width), its border repeated around it."""
    own_height, own_width = picture.shape[1:]
    scale = min(height / own_height, width / own_width)
    size = (min(height, round(own_height * scale)), min(width, round(own_width * scale)))
    if size != (own_height, own_width):
        picture = resize(picture[None], size)[0]
    below, right = height - size[0], width - size[1]
    around = (right // 2, right - right // 2, below // 2, below - below // 2)
    return F.pad(picture[None], around, mode="replicate")[0] if any(around) else picture
