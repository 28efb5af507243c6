"""Preprocessing of images for vision networks: transformers' image processors in differentiable operations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import ConfigError

from .folders import read_json

PREPARATION_FILE = "preprocessor_config.json"
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preparation:
    """Resize the shortest side, crop the centre, normalise; equal to `transformers.CLIPImageProcessor`.

    The image is first rounded to 8 bits, which is the input of transformers' processors. Rounding passes the gradient
    through unchanged (straight-through estimator).

    Attributes:
        shortest: shortest side in pixels after resizing.
        crop: side of the square in the centre.
        mean, std: for each channel, for values in [0, 1].
    """

    shortest: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `preprocessor_config.json`.

        Raises:
            ConfigError: the file is missing, or contains steps other than resizing, cropping and normalising.
        """
        path = folder / PREPARATION_FILE
        values = read_json(path, "it is published with the weights and describes the preparation of images")
        try:
            return cls._parse(values)
        except KeyError as error:
            raise ConfigError(f"{path}: {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: this preparation is not supported: {error}") from None

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Self:
        size, crop = values["size"], values.get("crop_size", values["size"])
        shortest = size["shortest_edge"] if isinstance(size, dict) else size
        side = crop["height"] if isinstance(crop, dict) else crop
        if isinstance(crop, dict) and crop["height"] != crop["width"]:
            raise ValueError(f"a crop of {json.dumps(crop)} is not a square")
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not values.get(step, True):
                raise ValueError(f"{step} is false")
        mean, std = (tuple(float(value) for value in values[name]) for name in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("image_mean and image_std must have 3 values each")
        if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor {values['rescale_factor']} is not 1/255")
        if (resample := values.get("resample", 3)) not in _INTERPOLATION:
            raise ValueError(f"resample {resample} is neither 2 (bilinear) nor 3 (bicubic)")
        return cls(int(shortest), int(side), mean, std, _INTERPOLATION[resample])

    def __call__(self, frames: Tensor) -> Tensor:
        """Map (N, 3, H, W) frames in [0, 1], of any floating-point type, to (N, 3, S, S) float32."""
        height, width = frames.shape[-2:]
        short, long = min(height, width), max(height, width)
        longest = int(self.shortest * long / short)
        rows, columns = (self.shortest, longest) if height <= width else (longest, self.shortest)
        # Round in between, like Pillow and torchvision.
        resized = self._resized(self._resized(as_8_bit(frames.float()), height, columns), rows, columns)
        square = self._centre(resized)
        mean, std = (square.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (square - mean) / std

    def _resized(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        if frames.shape[-2:] == (rows, columns):
            return frames
        size = (rows, columns)
        return as_8_bit(F.interpolate(frames, size, mode=self.interpolation, antialias=True, align_corners=False))

    def _centre(self, frames: Tensor) -> Tensor:
        """Crop the centre; pad smaller images with black."""
        missing = [max(0, self.crop - extent) for extent in frames.shape[-2:]]
        if any(missing):
            top, left = missing[0] // 2, missing[1] // 2
            frames = F.pad(frames, (left, missing[1] - left, top, missing[0] - top))
        top, left = ((extent - self.crop) // 2 for extent in frames.shape[-2:])
        return frames[..., top : top + self.crop, left : left + self.crop]


def as_8_bit(frames: Tensor) -> Tensor:
    """Round and clip to 8-bit levels; the gradient is passed through unchanged."""
    with torch.no_grad():
        levels = (frames * 255).round().clamp(0, 255) / 255
        change = levels - frames
    return frames + change
