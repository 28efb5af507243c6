"""The video sizes that Wan supports."""

from frostline.models.video_shape import Geometry

# One latent frame for the first video frame, then one for every four.
TEMPORAL_STRIDE = 4
# The VAE halves height and width three times; that of Wan2.2 TI2V once more.
SPATIAL_STRIDE = 8
# Requirements of all variants: the denoiser uses 2x2 patches of the latents. See `ModelSpec.geometry` for one model.
GEOMETRY = Geometry(TEMPORAL_STRIDE, SPATIAL_STRIDE, spatial_multiple=2 * SPATIAL_STRIDE)

# Channels of `y` that mark which of a latent frame's four video frames are given.
MASK_CHANNELS = TEMPORAL_STRIDE
# Tokens and width of the CLIP feature of the first frame.
CLIP_FEATURE = (257, 1280)
