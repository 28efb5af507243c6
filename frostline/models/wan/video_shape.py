"""What a Wan model makes of a video's extents."""

from dataclasses import dataclass

from frostline.errors import ConfigError

# Temporal compression: one latent frame for the first video frame, then one for every four.
TEMPORAL_STRIDE = 4
# Height and width of a video: the VAE halves them three times and the denoiser takes 2x2 patches of the latents.
# The VAE of Wan2.2 TI2V halves once more: `ModelSpec.spatial_multiple` is what a model wants.
SPATIAL_MULTIPLE = 16

# Channels of `y` that say which of a latent frame's four video frames are given.
MASK_CHANNELS = 4
# Tokens and width of the CLIP feature of the first frame.
CLIP_FEATURE = (257, 1280)


def latent_grid(num_frames: int, height: int, width: int, spatial_stride: int) -> tuple[int, int, int]:
    """Frames, height and width of a video's latents, `spatial_stride` pixels a side each."""
    return (num_frames - 1) // TEMPORAL_STRIDE + 1, height // spatial_stride, width // spatial_stride


def nearest_multiple(size: int, multiple: int = SPATIAL_MULTIPLE) -> int:
    """The multiple of `multiple` nearest to a size in pixels, at least one; halfway goes up."""
    return max(multiple, (size + multiple // 2) // multiple * multiple)


def check_cut(
    num_frames: int,
    height: int | None,
    width: int | None,
    max_pixels: int,
    frame_stride: int,
    multiple: int = SPATIAL_MULTIPLE,
) -> None:
    """Refuse, with a ConfigError, what Wan cannot take; see `VideoSettings` for the arguments."""
    if num_frames < 1 or num_frames % TEMPORAL_STRIDE != 1:
        raise ConfigError(f"num_frames must be 4k+1 (1, 5, 9, …), not {num_frames}")
    if (height is None) != (width is None):
        raise ConfigError("height and width go together: set both or neither")
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < multiple or side % multiple):
            raise ConfigError(f"{name} must be a multiple of {multiple}, not {side}")
    if max_pixels < multiple**2:
        raise ConfigError(f"max_pixels must be at least {multiple**2}, not {max_pixels}")
    if frame_stride < 1:
        raise ConfigError(f"frame_stride must be at least 1, not {frame_stride}")


@dataclass(frozen=True)
class VideoShape:
    """What a step computes on: samples, frames (4k + 1), pixels."""

    batch_size: int
    num_frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of all frames of all samples."""
        return self.batch_size * self.num_frames * self.height * self.width
