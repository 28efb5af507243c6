"""Write videos: H.264 in mp4."""

from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
import torch
import torch.nn.functional as F
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from frostline.atomic_io import atomic_write
from frostline.errors import ConfigError, DataError


def write_video(path: str | Path, frames: torch.Tensor, fps: float = 16, crf: int = 18, lossless: bool = False) -> Path:
    """Write `(T, 3, H, W)` frames (uint8, or float in [0, 1]) as an H.264 mp4; return the path.

    The default is yuv420p, which all players support and which needs even sizes: an odd height or width is padded by
    repeating the last row or column. `lossless=True` stores RGB without loss, for any size; it is read back bit for
    bit, but few players support it. The file is written atomically.

    Args:
        path: the file to write; must end in `.mp4`.
        frames: the frames; floats are clamped to [0, 1] and rounded to 8 bits.
        fps: frames per second.
        crf: the quality of H.264, from 0 (best) to 51; ignored if `lossless` is set.
        lossless: whether to store RGB without loss.
    Raises:
        ConfigError: `fps` is not positive, or PyAV has no H.264 encoder.
        DataError: the suffix, or the shape, dtype or values of the frames are invalid, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise DataError(f"{path}: videos must be written to a .mp4 file")
    if not fps > 0:
        raise ConfigError(f"fps must be above 0, not {fps}")
    pixels = _as_uint8(frames, path)
    height, width = pixels.shape[-2:]
    if not lossless:
        # Replicate padding needs floats; converting uint8 to float32 and back is exact.
        pad = (0, width % 2, 0, height % 2)
        pixels = F.pad(pixels.float(), pad, mode="replicate").to(torch.uint8) if any(pad) else pixels
    with atomic_write(path) as part:
        try:
            _encode(part, pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy(), fps, crf, lossless)
        except av.error.FFmpegError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _as_uint8(frames: torch.Tensor, path: Path) -> torch.Tensor:
    """Convert frames from uint8 or floats in [0, 1] (rounded, clamped) to uint8 `(T, 3, H, W)`."""
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise DataError(f"{path}: frames must have shape (T, 3, H, W), not {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise DataError(f"{path}: frames must be uint8 or float in [0, 1], not {frames.dtype}")
    pixels = frames.detach().float()
    if not torch.isfinite(pixels).all():
        raise DataError(f"{path}: frames contain NaN or infinite pixels")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _encode(path: Path, pixels: np.ndarray, fps: float, crf: int, lossless: bool) -> None:
    """Encode uint8 `(T, H, W, 3)` frames to a new mp4 file."""
    codec = "libx264rgb" if lossless else "libx264"
    if codec not in av.codecs_available:
        raise ConfigError(f"this build of PyAV has no {codec} encoder: install av from its PyPI wheel")
    options = {"crf": "0" if lossless else str(crf)}
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(VideoStream, container.add_stream(codec, rate, options=options))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        if not lossless:
            # Without these tags, players guess the colour matrix from the size, and small videos look tinted.
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
            stream.codec_context.color_range = ColorRange.MPEG
        for array in pixels:
            frame = VideoFrame.from_ndarray(array, format="rgb24")
            if not lossless:
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
