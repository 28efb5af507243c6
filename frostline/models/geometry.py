"""What a Wan model makes of a video's extents."""

from dataclasses import dataclass

# Temporal compression: one latent frame for the first video frame, then one for every four.
TEMPORAL_STRIDE = 4
# Height and width of a video: the VAE halves them three times and the denoiser takes 2x2 patches of the latents.
# The VAE of Wan2.2 TI2V halves once more: `WanComponents.spatial_multiple` is what a model wants.
SPATIAL_MULTIPLE = 16


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
