"""Pad whole images to a square, the preprocessing of HPS v2."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .preparation import as_8_bit


@dataclass(frozen=True)
class Letterbox:
    """Resize the longest side, pad the shorter one with black, normalise; equal to HPSv2's `ResizeMaxSize`.

    The image is first rounded to 8 bits; the resized image is not rounded again. Rounding passes the gradient through
    unchanged (straight-through estimator).

    Attributes:
        side: S of the square in pixels.
        mean, std: for each channel, for values in [0, 1].
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, frames: Tensor) -> Tensor:
        """Map (N, 3, H, W) frames in [0, 1], of any floating-point type, to (N, 3, S, S) float32."""
        pixels = as_8_bit(frames.float())
        longest = max(pixels.shape[-2:])
        rows, columns = size = tuple(max(1, round(extent * self.side / longest)) for extent in pixels.shape[-2:])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        below, right = self.side - rows, self.side - columns
        square = F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
        mean, std = (square.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (square - mean) / std
