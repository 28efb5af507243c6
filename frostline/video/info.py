"""What is common to pictures and videos: their description, their names, and how large they may be."""

from dataclasses import dataclass
from pathlib import Path

from frostline.errors import DataError

# By these the files of a folder are found; what a file is, its content says.
_VIDEOS = ".3g2 .3gp .asf .avi .flv .m2ts .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
_PICTURES = ".apng .avif .avifs .bmp .gif .heic .heif .hif .jfif .jpeg .jpg .png .tif .tiff .webp"
MEDIA_SUFFIXES = frozenset(f"{_VIDEOS} {_PICTURES}".split(" "))

# Four times 8K: more is what a damaged file claims, and would fill the memory.
MAX_FRAME_PIXELS = 4 * 7680 * 4320


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about itself, without decoding more than its first frame.

    `frames` and `duration` (seconds) are None where the file does not say. `width` and `height` are of the picture
    as `read_video` returns it: upright, in square pixels. `rotation` is how far the stored picture is turned
    counter-clockwise to become upright: 0, 90, 180 or 270 degrees. `fps` is 0 for a still picture, and of an
    animation that of its first frame.
    """

    frames: int | None
    width: int
    height: int
    fps: float
    duration: float | None
    rotation: int


def check_size(width: int, height: int, path: Path) -> None:
    """Refuse a frame that is too large to be one.

    Raises:
        DataError: it is; names the file and the size.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"{path}: a frame of {width}x{height} pixels is too large, or the file is damaged")
