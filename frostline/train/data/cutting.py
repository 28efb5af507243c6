"""Frames of a file as a sample has them: resized to cover its size, and cropped."""

from __future__ import annotations

import math

import torch

from frostline.stages.families import DEFAULT_GEOMETRY
from frostline.train.data.batch import resize

_FRAMES_AT_ONCE = 8
_PIXELS_AT_ONCE = 2**24
"""Resized together: enough to be quick, few enough that no clip is ever whole in float32 at its own size."""


def size_within(
    height: int, width: int, max_pixels: int, multiple: int = DEFAULT_GEOMETRY.spatial_multiple
) -> tuple[int, int]:
    """(height, width) shrunk to at most `max_pixels`, in multiples rounded down, at least one of them each."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    # The small term keeps a size that is already a multiple from falling to the next through rounding.
    fitted = [max(1, math.floor(side * scale / multiple + 1e-9)) for side in (height, width)]
    return fitted[0] * multiple, fitted[1] * multiple


def crop_to(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 `(T, 3, H, W)` as float32 in [0, 1], cut to `size` (height, width)."""
    height, width = size
    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    covering = max(height, round(frames.shape[-2] * scale)), max(width, round(frames.shape[-1] * scale))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pieces: list[torch.Tensor] = []
    for piece in frames.split(frames_at_once(*frames.shape[-2:])):
        # Channel by channel: of one large picture, that is all that can be done by halves.
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
