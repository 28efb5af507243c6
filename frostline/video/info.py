"""Common code for pictures and videos: description, file names, and size limits."""

from dataclasses import dataclass
from pathlib import Path

from frostline.errors import DataError

# Suffixes that select the files in a folder; the format is detected from the content.
_VIDEOS = ".3g2 .3gp .asf .avi .flv .m2ts .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
_PICTURES = ".apng .avif .avifs .bmp .gif .heic .heif .hif .jfif .jpeg .jpg .png .tif .tiff .webp"
MEDIA_SUFFIXES = frozenset(f"{_VIDEOS} {_PICTURES}".split(" "))

# Four times 8K: larger sizes come from damaged files and would fill the memory.
MAX_FRAME_PIXELS = 4 * 7680 * 4320


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or picture, from the metadata of its file and its first frame.

    Attributes:
        frames: the number of frames; None if the file does not state it.
        duration: the duration in seconds; None if the file does not state it.
        width: the width of a frame as `read_video` returns it: upright, in square pixels.
        height: the height of such a frame.
        rotation: counter-clockwise rotation, in degrees, that makes the stored picture upright: 0, 90, 180 or 270.
        fps: frames per second; for an animation, the rate of its first frame; 0 for a still picture, or if unknown.
    """

    frames: int | None
    width: int
    height: int
    fps: float
    duration: float | None
    rotation: int


def check_size(width: int, height: int, path: Path) -> None:
    """Check that a frame is not too large.

    Raises:
        DataError: the frame is too large; the message names the file and the size.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"{path}: a frame of {width}x{height} pixels is too large, or the file is damaged")
