"""Frames of two public-domain people, for the videos of the tests."""

from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

SIZE = 160


def portrait(person: str, size: int = SIZE) -> np.ndarray:
    """Return a (size, size, 3) uint8 picture of the astronaut or the admiral."""
    if person == "astronaut":
        image = Image.fromarray(skimage.data.astronaut()).crop((104, 0, 344, 240))
    else:
        path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        image = Image.open(path).convert("RGB").crop((40, 10, 490, 460))
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))


def moving(person: str, frames: int = 5, size: int = SIZE) -> Tensor:
    """Return (frames, 3, size, size) uint8: a drifting, flickering portrait."""
    picture = portrait(person, size)
    pictures = [np.roll(picture, (t % 5, -(t % 7)), axis=(0, 1)) * (0.85 + 0.03 * (t % 5)) for t in range(frames)]
    return torch.from_numpy(np.stack(pictures).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
