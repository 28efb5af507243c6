"""The range of shapes that engines support, and its syntax on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import cast

from frostline.errors import ConfigError
from frostline.models.video_shape import Geometry
from frostline.runtime.dynamic_dim import Dimension
from frostline.stages.families import DEFAULT_GEOMETRY

Range = tuple[int, int, int]

# For each tensor name on the command line, the dimension that each of its sizes sets; a number is a fixed size.
_LAYOUTS: dict[str, tuple[str | int, ...]] = {
    "video": ("batch", "frames", 3, "height", "width"),
    "faces": ("faces", 3, "side", "side"),
    "frames": ("faces", 3, "face_height", "face_width"),
    "images": ("images", 3, "side", "side"),
}


@dataclass(frozen=True)
class ShapeRange:
    """Minimum, typical and maximum sizes of dimensions.

    Attributes:
        batch: number of samples.
        latent_frames: number of latent frames of a video.
        height, width: in pixels; multiples of the model's spatial multiple.
        rank: rank of the LoRA.
        faces: number of crops or frames in one call of a face network.
        face_height, face_width: size, in pixels, of the images for the first network of the face detector.
        images: number of images in one call of a network that processes whole images, such as CLIP; larger batches are
            split.
    """

    batch: Range = (1, 2, 32)
    latent_frames: Range = (1, 3, 32)
    height: Range = (32, 96, 1024)
    width: Range = (32, 96, 1024)
    rank: Range = (2, 8, 256)
    faces: Range = (1, 18, 2048)
    face_height: Range = (12, 64, 4096)
    face_width: Range = (12, 64, 4096)
    images: Range = (1, 16, 32)

    def __post_init__(self) -> None:
        for dimension in fields(self):
            low, typical, high = getattr(self, dimension.name)
            if not 1 <= low <= typical <= high:
                raise ConfigError(
                    f"shapes: {dimension.name} must satisfy 1 <= min <= opt <= max, not {low}, {typical}, {high}"
                )

    def dimension(self, name: str) -> Dimension:
        """Return the dynamic dimension `name` of this class."""
        low, typical, high = getattr(self, name)
        return Dimension(name, low, typical, high)

    def pixels(self, name: str, per_block: int, multiple: int) -> Dimension:
        """Return `height` or `width` of a tensor with `per_block` entries for every `multiple` pixels.

        Raises:
            ConfigError: a size is not a multiple of what the model requires.
        """
        extents: Range = getattr(self, name)
        for extent in extents:
            if extent % multiple:
                raise ConfigError(f"shapes: {name} {extent} is not a multiple of {multiple}, as this model requires")
        low, typical, high = (extent // multiple for extent in extents)
        return Dimension(name, low, typical, high, per_block, multiple)


def parse_shapes(
    min_shapes: str = "", opt_shapes: str = "", max_shapes: str = "", geometry: Geometry = DEFAULT_GEOMETRY
) -> ShapeRange:
    """Parse a range in trtexec syntax, `name:1x5x3x64x64,…`; other tensors keep their defaults.

    Names are `video` (batch, frames, 3, height, width), `faces` (count, 3, side, side) and `frames` (count, 3, height,
    width) of the face stages, and `images` (count, 3, side, side) of stages that process whole images. Defaults are
    adjusted if a given shape contradicts them.

    Args:
        geometry: the requirements of the model on videos.
    Raises:
        ConfigError: a part is invalid; the message names it and shows the expected form.
    """
    low = _extents("--min-shapes", min_shapes, geometry)
    typical = _extents("--opt-shapes", opt_shapes, geometry)
    high = _extents("--max-shapes", max_shapes, geometry)
    ranges = {}
    for dimension in fields(ShapeRange):
        name, default = dimension.name, cast(Range, dimension.default)
        smallest, largest = low.get(name, default[0]), high.get(name, default[2])
        usual = typical.get(name, min(max(default[1], smallest), high.get(name, max(default[2], smallest))))
        ranges[name] = (
            low.get(name, min(smallest, usual)),
            usual,
            high.get(name, max(largest, usual)),
        )
    return ShapeRange(**ranges)


def asked_maximum(max_shapes: str, geometry: Geometry = DEFAULT_GEOMETRY) -> frozenset[str]:
    """Return the dimensions of `ShapeRange` whose maximum `--max-shapes` sets.

    Raises:
        ConfigError: see `parse_shapes`.
    """
    return frozenset(_extents("--max-shapes", max_shapes, geometry))


def _extents(flag: str, text: str, geometry: Geometry) -> dict[str, int]:
    """Return the sizes of dimensions of `ShapeRange` that one flag sets."""
    extents: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, shape = part.partition(":")
        layout = _LAYOUTS.get(name.strip())
        if layout is None:
            raise ConfigError(f"{flag}: unknown tensor {name!r}; valid names: {', '.join(_LAYOUTS)}")
        if not re.fullmatch(r"\d+(x\d+)*", shape.strip()):
            raise ConfigError(f"{flag}: {part!r} is not in the form {name}:{_example(layout)}")
        numbers = [int(number) for number in shape.split("x")]
        if len(numbers) != len(layout):
            raise ConfigError(f"{flag}: {name} has {len(layout)} dimensions, {_example(layout)}, not {shape}")
        for meaning, number in zip(layout, numbers, strict=True):
            _take(extents, meaning, number, geometry, f"{flag}: {part}")
    return extents


def _take(extents: dict[str, int], meaning: str | int, number: int, geometry: Geometry, where: str) -> None:
    if isinstance(meaning, int):
        if number != meaning:
            raise ConfigError(f"{where}: {number} must be {meaning}")
    elif meaning == "frames":
        if number != geometry.fitting_frames(number):
            raise ConfigError(f"{where}: a video has {geometry.temporal_stride}k + 1 frames, not {number}")
        extents["latent_frames"] = geometry.latent_grid(number, 0, 0)[0]
    elif meaning in ("height", "width") and number % geometry.spatial_multiple:
        raise ConfigError(f"{where}: {meaning} {number} is not a multiple of {geometry.spatial_multiple}")
    elif meaning != "side":
        extents[meaning] = number


def _example(layout: tuple[str | int, ...]) -> str:
    return "x".join(str(part) for part in layout)
