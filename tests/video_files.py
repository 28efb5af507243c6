"""Video files of every kind, made with PyAV alone."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange


def encode(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    crf: int | None = None,
    **extra: Any,
) -> Path:
    """Write pictures (H, W, 3) or (H, W, 4).

    crf: of libx264. extra: rotation and hflip of the display matrix, format, faststart, b_frames.
    """
    options = {"movflags": "faststart"} if extra.get("faststart") else {}
    with av.open(str(path), "w", format=extra.get("format"), options=options) as container:
        quality = {} if crf is None or codec != "libx264" else {"crf": str(crf)}
        stream = container.add_stream(codec, rate=16, options=quality)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if "rotation" in extra:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a display matrix")
            stream.set_display_rotation(extra["rotation"], hflip=extra.get("hflip", False))
        if "b_frames" in extra:
            stream.codec_context.max_b_frames = extra["b_frames"]
        if pix_fmt.startswith("gray"):
            stream.codec_context.color_range = ColorRange.JPEG
        for picture in pictures:
            source = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source).reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def audio_only(path: Path) -> None:
    """A file with a sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path: Path, container_format: str = "mp4") -> None:
    """A video stream of which only the header was written."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
