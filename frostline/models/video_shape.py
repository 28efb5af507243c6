"""The extents of videos: what a step computes on, and which of them a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frostline.errors import ConfigError


@dataclass(frozen=True)
class VideoShape:
    """What a step computes on: samples, frames, pixels."""

    batch_size: int
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.num_frames}x{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """Of all frames of all samples."""
        return self.batch_size * self.num_frames * self.height * self.width


@dataclass(frozen=True)
class Geometry:
    """Which videos a model takes, and the size of their latents.

    temporal_stride: the first frame has a latent frame of its own, and so have each `temporal_stride` frames after it.
    spatial_stride: pixels per latent, in height and width.
    spatial_multiple: height and width of a video are multiples of it.
    """

    temporal_stride: int
    spatial_stride: int
    spatial_multiple: int

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return frames, height and width of a video's latents."""
        return (
            (num_frames - 1) // self.temporal_stride + 1,
            height // self.spatial_stride,
            width // self.spatial_stride,
        )

    def num_frames(self, latent_frames: int) -> int:
        """Return the frames of a video that has so many latent frames."""
        return self.temporal_stride * (latent_frames - 1) + 1

    def fitting_frames(self, num_frames: int) -> int:
        """Return the smallest number of frames that the model takes and that is not below `num_frames`."""
        return self.num_frames(-(-(num_frames - 1) // self.temporal_stride) + 1)

    def nearest_side(self, pixels: int) -> int:
        """Return the multiple of `spatial_multiple` nearest to a height or width, at least one; halfway goes up."""
        return nearest_multiple(pixels, self.spatial_multiple)

    def square_side(self, pixels: int) -> int:
        """Return the side of the square nearest to so many pixels."""
        return self.nearest_side(math.isqrt(pixels))

    def check_frames(self, num_frames: int) -> None:
        """Refuse a number of frames that the model does not take.

        Raises:
            ConfigError: says which numbers it takes.
        """
        stride = self.temporal_stride
        if num_frames < 1 or num_frames % stride != 1 % stride:
            numbers = ", ".join(str(self.num_frames(count)) for count in (1, 2, 3))
            raise ConfigError(f"num_frames must be {stride}k+1 ({numbers}, …), not {num_frames}")

    def check_cut(
        self, num_frames: int, height: int | None, width: int | None, max_pixels: int, frame_stride: int
    ) -> None:
        """Refuse what the model does not take; see `VideoSettings` for the arguments.

        Raises:
            ConfigError: says which values it takes.
        """
        self.check_frames(num_frames)
        if (height is None) != (width is None):
            raise ConfigError("height and width go together: set both or neither")
        multiple = self.spatial_multiple
        for name, side in (("height", height), ("width", width)):
            if side is not None and (side < multiple or side % multiple):
                raise ConfigError(f"{name} must be a multiple of {multiple}, not {side}")
        if max_pixels < multiple**2:
            raise ConfigError(f"max_pixels must be at least {multiple**2}, not {max_pixels}")
        if frame_stride < 1:
            raise ConfigError(f"frame_stride must be at least 1, not {frame_stride}")


def nearest_multiple(size: int, multiple: int) -> int:
    """Return the multiple of `multiple` nearest to a size in pixels, at least one; halfway goes up."""
    return max(multiple, (size + multiple // 2) // multiple * multiple)
