"""The range of shapes that engines serve."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.runtime.stage import Dimension

# A video's height and width are multiples of this; of its latents', of an eighth of it.
SPATIAL_MULTIPLE = 16


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, typical and largest extents.

    batch: samples. latent_frames: k + 1 for a video of 4k + 1 frames. height, width: pixels, multiples of 16.
    rank: of the LoRA. faces: crops or frames in one call of a face network. face_height, face_width: pixels of the
    images that the first network of the face detector scans.
    """

    batch: tuple[int, int, int] = (1, 2, 32)
    latent_frames: tuple[int, int, int] = (1, 3, 32)
    height: tuple[int, int, int] = (32, 96, 1024)
    width: tuple[int, int, int] = (32, 96, 1024)
    rank: tuple[int, int, int] = (2, 8, 256)
    faces: tuple[int, int, int] = (1, 18, 2048)
    face_height: tuple[int, int, int] = (12, 64, 2048)
    face_width: tuple[int, int, int] = (12, 64, 2048)

    def dimension(self, name: str, multiple: int = 1) -> Dimension:
        """The open dimension `name` of this class."""
        low, typical, high = getattr(self, name)
        return Dimension(name, low, typical, high, multiple)

    def pixels(self, name: str, per_block: int = SPATIAL_MULTIPLE) -> Dimension:
        """`height` or `width` of a tensor that has `per_block` entries for every 16 pixels."""
        low, typical, high = (extent // SPATIAL_MULTIPLE for extent in getattr(self, name))
        return Dimension(name, low, typical, high, per_block)
