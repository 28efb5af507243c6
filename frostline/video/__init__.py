"""Read and write videos and pictures.

A video in memory is a `torch.uint8` tensor `(T, 3, H, W)`, RGB, upright and in square pixels, as a player displays it.
A still picture is a one-frame video. Pictures and animations are read with Pillow, everything else with PyAV; the
format is detected from the content of a file, and only Motion JPEG from its name. An error in a file is a `DataError`
that names the file and the reason.
"""

from .info import MEDIA_SUFFIXES, VideoInfo
from .reading import count_frames, equal_frames, probe_video, read_video, stream_video
from .writing import write_video

__all__ = [
    "MEDIA_SUFFIXES",
    "VideoInfo",
    "count_frames",
    "equal_frames",
    "probe_video",
    "read_video",
    "stream_video",
    "write_video",
]
