"""Sizes of videos: those of a training step, and those that a model supports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frostline.errors import ConfigError


@dataclass(frozen=True)
class VideoShape:
    """Size of the videos in a step: samples, frames, pixels."""

    batch_size: int
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.num_frames}x{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """Return the number of pixels in all frames of all samples."""
        return self.batch_size * self.num_frames * self.height * self.width


@dataclass(frozen=True)
class Geometry:
    """The video sizes that a model supports, and the size of their latents.

    Attributes:
        temporal_stride: the first frame has its own latent frame, and each following group of `temporal_stride` frames
            has one.
        spatial_stride: pixels per latent, in height and width.
        spatial_multiple: height and width of a video must be multiples of it.
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
        """Return the number of frames of a video with this number of latent frames."""
        return self.temporal_stride * (latent_frames - 1) + 1

    def fitting_frames(self, num_frames: int) -> int:
        """Return the smallest supported number of frames that is at least `num_frames`."""
        return self.num_frames(-(-(num_frames - 1) // self.temporal_stride) + 1)

    def nearest_side(self, pixels: int) -> int:
        """Return the height or width nearest to `pixels` that the model supports; see `nearest_multiple`."""
        return nearest_multiple(pixels, self.spatial_multiple)

    def square_side(self, pixels: int) -> int:
        """Return the side of a square with about this number of pixels, a multiple of `spatial_multiple`."""
        return self.nearest_side(math.isqrt(pixels))

    def check_frames(self, num_frames: int) -> None:
        """Check that the model supports this number of frames.

        Raises:
            ConfigError: it does not; the message gives the valid numbers.
        """
        stride = self.temporal_stride
        if num_frames < 1 or num_frames % stride != 1 % stride:
            numbers = ", ".join(str(self.num_frames(count)) for count in (1, 2, 3))
            raise ConfigError(f"num_frames must be {stride}k+1 ({numbers}, …), not {num_frames}")

    def check_cut(
        self, num_frames: int, height: int | None, width: int | None, max_pixels: int, frame_stride: int
    ) -> None:
        """Check that the model supports these sizes; see `VideoSettings` for the arguments.

        Raises:
            ConfigError: it does not; the message gives the valid values.
        """
        self.check_frames(num_frames)
        if (height is None) != (width is None):
            raise ConfigError("height and width must be set together")
        multiple = self.spatial_multiple
        for name, side in (("height", height), ("width", width)):
            if side is not None and (side < multiple or side % multiple):
                raise ConfigError(f"{name} must be a multiple of {multiple}, not {side}")
        if max_pixels < multiple**2:
            raise ConfigError(f"max_pixels must be at least {multiple**2}, not {max_pixels}")
        if frame_stride < 1:
            raise ConfigError(f"frame_stride must be at least 1, not {frame_stride}")


def nearest_multiple(size: int, multiple: int) -> int:
    """Return the multiple of `multiple` nearest to a size in pixels, at least `multiple`; halves are rounded up."""
    return max(multiple, (size + multiple // 2) // multiple * multiple)
