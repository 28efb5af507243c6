"""Videos and pictures in and out.

A video in memory is a `torch.uint8` tensor `(T, 3, H, W)`, RGB, upright and in square pixels: what a player shows.
A still picture is a one-frame video. Pictures and animations are read through Pillow, everything else through PyAV;
the content of a file decides, not its name. Every fault is a `DataError` that names the file and the reason.
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
