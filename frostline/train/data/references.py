"""Reference pictures of a sample: files and folders as one tensor of limited size."""

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
"""Maximum number of pictures of a sample; they are selected evenly from more pictures or from a video."""
MAX_SIDE = 1024
"""Maximum height and width in pixels; larger pictures are shrunk."""
MAX_VIDEO_FRAMES = 480
"""Number of frames of a reference video from which pictures are selected: 20 seconds at 24 frames per second."""


def read_references(paths: Sequence[Path], warn: Callable[[str], None]) -> torch.Tensor:
    """Read pictures, videos and folders of them as one float32 tensor (R, 3, h, w) in [0, 1].

    Each of n files contributes at most `MAX_PICTURES // n` frames, at least one, evenly selected from its first
    `MAX_VIDEO_FRAMES`. If there are more than `MAX_PICTURES` files, that number is evenly selected.

    Pictures larger than `MAX_SIDE` are shrunk. If sizes differ, h and w are the largest height and width: each picture
    is enlarged to fit, keeping its aspect ratio, and padded by repeating its border.

    Args:
        warn: called with messages about skipped files and lost frames.
    Raises:
        DataError: a file cannot be read, a folder has no pictures, a picture is too small, or memory is not sufficient.
    """
    try:
        files = _chosen_files(paths, warn)
        most = max(1, MAX_PICTURES // len(files))
        pictures = [picture for file in files for picture in _read_file(file, most, warn)]
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
        return torch.stack([_fitted(picture, height, width) for picture in pictures])
    except (MemoryError, RuntimeError) as error:  # PyTorch raises RuntimeError
        if is_out_of_memory(error):
            raise DataError(f"{', '.join(map(str, paths))}: not enough memory for the reference pictures") from error
        raise


def check_references(paths: Sequence[Path], deep: bool) -> None:
    """Open every file and decode its first frame or, with `deep`, everything that `read_references` reads.

    Raises:
        DataError: see `read_references`.
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
    warn(f"using {MAX_PICTURES} of its {len(files)} reference pictures, evenly selected")
    return [files[index * len(files) // MAX_PICTURES] for index in range(MAX_PICTURES)]


def _files_of_folder(folder: Path) -> list[Path]:
    """Return the pictures and videos in a folder, by name, without hidden files and subfolders."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    files = [path for path in entries if path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise DataError(f"{folder}: the folder contains no pictures")
    return files


def _read_file(file: Path, most: int, warn: Callable[[str], None]) -> list[torch.Tensor]:
    """Return at most `most` frames of a file, (3, h, w) each; one frame at a time is in memory at full size."""
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
        raise DataError(
            f"{file}: a picture of {width}x{height} is too small: each side must have at least {SMALLEST_SIDE} pixels"
        )


def _fitted(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return (3, h, w) enlarged to fit (height, width), with its border repeated around it."""
    own_height, own_width = picture.shape[1:]
    scale = min(height / own_height, width / own_width)
    size = (min(height, round(own_height * scale)), min(width, round(own_width * scale)))
    if size != (own_height, own_width):
        picture = resize(picture[None], size)[0]
    below, right = height - size[0], width - size[1]
    around = (right // 2, right - right // 2, below // 2, below - below // 2)
    return F.pad(picture[None], around, mode="replicate")[0] if any(around) else picture
