"""Resize the frames of a file to cover the size of a sample, and crop them."""

from __future__ import annotations

import math

import torch

from frostline.stages.families import DEFAULT_GEOMETRY
from frostline.train.data.batch import resize

_FRAMES_AT_ONCE = 8
_PIXELS_AT_ONCE = 2**24
"""Maximum number of frames and of pixels that are resized together: enough to be fast, and few enough that a clip is
never in memory as float32 at its original size.
"""


def size_within(
    height: int, width: int, max_pixels: int, multiple: int = DEFAULT_GEOMETRY.spatial_multiple
) -> tuple[int, int]:
    """Return (height, width) reduced to at most `max_pixels` in area, each rounded down to a multiple of `multiple`.

    Each side is at least `multiple`.
    """
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    # The small term prevents rounding errors from reducing a size that is already a multiple.
    fitted = [max(1, math.floor(side * scale / multiple + 1e-9)) for side in (height, width)]
    return fitted[0] * multiple, fitted[1] * multiple


def crop_to(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize and crop uint8 `(T, 3, H, W)` to float32 in [0, 1] with `size` (height, width)."""
    height, width = size
    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    covering = max(height, round(frames.shape[-2] * scale)), max(width, round(frames.shape[-1] * scale))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pieces: list[torch.Tensor] = []
    for piece in frames.split(frames_at_once(*frames.shape[-2:])):
        # Channel by channel, which limits the memory for one large picture.
        channels = []
        for channel in piece.split(1, dim=1):
            pixels = channel.float().div_(255)
            if covering != tuple(pixels.shape[-2:]):
                pixels = resize(pixels, covering)
            channels.append(pixels[..., top : top + height, left : left + width])
        pieces.append(torch.cat(channels, dim=1))
    return torch.cat(pieces)


def frames_at_once(height: int, width: int) -> int:
    """Return how many frames of a size to resize together."""
    return max(1, min(_FRAMES_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))
