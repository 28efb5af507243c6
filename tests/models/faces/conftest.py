"""Photographs for the tests of faces, from installed packages; two of them are public-domain portraits."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from frostline.models.faces import SFaceEmbedder


def as_frames(*images: Image.Image) -> Tensor:
    """Return (N, 3, H, W) uint8 frames of N pictures of the same size."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def astronaut() -> Image.Image:
    """Return a picture of Eileen Collins, 512 by 512 pixels, face about 87 by 110 (NASA)."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture(scope="session")
def hopper() -> Image.Image:
    """Return a picture of Grace Hopper, 512 by 600 pixels, face about 181 by 221 (US Navy)."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="session")
def clip(astronaut: Image.Image, hopper: Image.Image) -> Callable[..., Tensor]:
    """`clip(size, frames, person)`: (frames, 3, size, size) uint8 frames of a drifting, flickering portrait."""
    portraits = {"astronaut": astronaut.crop((104, 0, 344, 240)), "hopper": hopper.crop((40, 10, 490, 460))}

    def render(size: int, frames: int = 4, person: str = "astronaut") -> Tensor:
        portrait = np.array(portraits[person].resize((size, size), Image.Resampling.LANCZOS))
        images = []
        for t in range(frames):
            moved = np.roll(portrait, (t * size // 40, -t * size // 50), axis=(0, 1))
            images.append(Image.fromarray(np.clip(moved * (0.8 + 0.1 * t), 0, 255).astype(np.uint8)))
        return as_frames(*images)

    return render


@pytest.fixture(scope="session")
def group_picture(astronaut: Image.Image, hopper: Image.Image) -> Tensor:
    """Return a (1, 3, 360, 480) uint8 frame with six faces of 35 to 130 pixels, two of them cut off by the border."""
    picture = Image.new("RGB", (480, 360), (90, 110, 130))
    woman, admiral = astronaut.crop((134, 20, 314, 220)), hopper.crop((90, 20, 440, 440))
    for portrait, height, place in (
        (woman, 160, (0, 10)),
        (admiral, 230, (150, 0)),
        (woman, 70, (360, 20)),
        (admiral, 75, (400, 120)),
        (woman, 180, (330, 220)),
        (admiral, 140, (-30, 200)),
    ):
        width = portrait.width * height // portrait.height
        picture.paste(portrait.resize((width, height), Image.Resampling.LANCZOS), place)
    return as_frames(picture)


@pytest.fixture(scope="session")
def pictures(astronaut: Image.Image, hopper: Image.Image) -> dict[str, Tensor]:
    """Return the pictures of faces in installed packages, as (3, H, W) uint8 frames by name.

    `lfw` contains the 100 faces of scikit-image's sample of "Labeled Faces in the Wild", 25 pixels a side, enlarged
    four times and placed next to each other.
    """
    tiles = skimage.data.lfw_subset()[:100].reshape(10, 10, 25, 25).transpose(0, 2, 1, 3).reshape(250, 250)
    lfw = Image.fromarray((tiles * 255).round().astype(np.uint8)).resize((1000, 1000), Image.Resampling.BICUBIC)
    photographs = {
        "astronaut": astronaut,
        "hopper": hopper,
        "camera": Image.fromarray(skimage.data.camera()).convert("RGB"),
        "lfw": lfw.convert("RGB"),
    }
    return {name: as_frames(picture)[0] for name, picture in photographs.items()}


@pytest.fixture(scope="session")
def sface() -> SFaceEmbedder:
    return SFaceEmbedder()
