"""Video files of every kind, written with PyAV."""

import struct
from fractions import Fraction
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
    """Write pictures (H, W, 3) or (H, W, 4) at 16 frames per second; return the path.

    Args:
        path: the file to write.
        pictures: the frames.
        codec: the encoder.
        pix_fmt: the pixel format.
        crf: the quality of libx264.
        extra: rotation and hflip of the display matrix; format; faststart; b_frames; gop (distance of key frames);
            codec_options; times (of the frames, in sixteenths of a second); audio_seconds (of a silent audio track).
    """
    options = {"movflags": "faststart"} if extra.get("faststart") else {}
    with av.open(str(path), "w", format=extra.get("format"), options=options) as container:
        quality = {} if crf is None or codec != "libx264" else {"crf": str(crf)}
        stream = container.add_stream(codec, rate=16, options={**quality, **extra.get("codec_options", {})})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if "rotation" in extra:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a display matrix")
            stream.set_display_rotation(extra["rotation"], hflip=extra.get("hflip", False))
        if "b_frames" in extra:
            stream.codec_context.max_b_frames = extra["b_frames"]
        if "gop" in extra:
            stream.codec_context.gop_size = extra["gop"]
        if pix_fmt.startswith("gray"):
            stream.codec_context.color_range = ColorRange.JPEG
        silence = container.add_stream("aac", rate=16000) if "audio_seconds" in extra else None
        for number, picture in enumerate(pictures):
            source = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source).reformat(format=pix_fmt)
            if "times" in extra:
                frame.pts, frame.time_base = extra["times"][number], Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if silence is not None:
            samples = np.zeros((1, int(16000 * extra["audio_seconds"])), np.float32)
            sound = AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(silence.encode(sound))
            container.mux(silence.encode())
    return path


def packets(path: Path) -> list[tuple[int, int]]:
    """Return the position in the file and the number of bytes of each packet of the first stream."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def damage_packet(path: Path, number: int, fill: int = 0) -> None:
    """Overwrite the payload of a packet with one byte value; its length does not change."""
    (position, size), content = packets(path)[number], bytearray(path.read_bytes())
    content[position + 4 : position + size] = bytes([fill]) * (size - 4)
    path.write_bytes(content)


def hide_all_but(path: Path, first: int, count: int) -> None:
    """Hide frames of an mp4 file at 16 frames per second with its edit list, like a cut without re-encoding."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    _, start = struct.unpack(">Ii", content[entry : entry + 8])
    (ticks,) = struct.unpack(">I", content[content.index(b"mdhd") + 16 :][:4])
    (movie_ticks,) = struct.unpack(">I", content[content.index(b"mvhd") + 16 :][:4])
    content[entry : entry + 8] = struct.pack(">Ii", count * movie_ticks // 16, start + first * ticks // 16)
    path.write_bytes(content)


def audio_only(path: Path) -> None:
    """Write a file with audio and without video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path: Path, container_format: str = "mp4") -> None:
    """Write a video stream that only has a header."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
