"""Video files in and out, through PyAV.

A video in memory is a `torch.uint8` tensor `(T, 3, H, W)`, RGB, upright (rotation and mirroring that the file
asks for are applied). A still image is a one-frame video. Every fault is a `DataError` that names the file
and the reason.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image

from frostline.errors import ConfigError, DataError
from frostline.writing import written_whole

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

# The demuxers that may open a file. Playlists (HLS, DASH, concat) are left out on purpose: they make one file
# read others, or the network. The audio ones are there only so that an audio file is told to be one.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,ivf,flv,ogg,asf,gif,mjpeg,yuv4mpegpipe,"
    "png_pipe,apng,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,mp3,wav,flac,aac"
)

# Four times 8K: more is what a damaged file claims, and would fill the memory.
_MAX_FRAME_PIXELS = 4 * 7680 * 4320

# Four entries (a, b, c, d) of a display matrix, each -1, 0 or 1: x' = a*x + c*y, y' = b*x + d*y, y downwards.
_Orientation = tuple[int, int, int, int]
_UPRIGHT: _Orientation = (1, 0, 0, 1)
_BY_ROTATION: dict[int, _Orientation] = {
    0: _UPRIGHT,
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    270: (0, 1, -1, 0),
}
_BY_EXIF: dict[int, _Orientation] = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself, without decoding more than its first frame.

    `frames` and `duration` (seconds) are None where the container does not say. `width` and `height` are of
    the upright picture, as `read_video` returns it; `rotation` is how far the stored picture is turned
    counter-clockwise to become upright: 0, 90, 180 or 270 degrees. `fps` is 0 for a still image.
    """

    frames: int | None
    width: int
    height: int
    fps: float
    duration: float | None
    rotation: int


def read_video(path: str | Path, max_frames: int | None = None, stride: int = 1) -> torch.Tensor:
    """Read frames 0, stride, 2*stride, … (at most `max_frames`) as uint8 `(T, 3, H, W)`, RGB, upright.

    A file that breaks off after some good frames gives those, with a warning.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ConfigError(f"max_frames and stride must be at least 1, not {max_frames} and {stride}")
    path = Path(path)
    with _opened(path) as (container, stream):
        frames = islice(_decoded(container, stream, path), 0, None, stride)
        first = next(frames)
        orientation = _orientation(first, container, path)
        arrays = [_rgb(first, path)]
        for frame in islice(frames, None if max_frames is None else max_frames - 1):
            if (frame.width, frame.height) != (first.width, first.height):
                raise DataError(
                    f"{path}: frames of unequal size: frame 0 is {first.width}x{first.height}, "
                    f"frame {len(arrays) * stride} is {frame.width}x{frame.height}"
                )
            arrays.append(_rgb(frame, path))
    video = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return _upright(video, orientation).contiguous()


def stream_video(
    path: str | Path,
    max_frames: int | None = None,
    stride: int = 1,
    warn: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The frames that `read_video` reads one after the other, as (number in the file, uint8 `(H, W, 3)`).

    Holds one frame at a time, and lets frames differ in size. A file that breaks off ends there.

    Args:
        warn: told why a file broke off; by default the log is.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ConfigError(f"max_frames and stride must be at least 1, not {max_frames} and {stride}")
    path = Path(path)
    stop = None if max_frames is None else (max_frames - 1) * stride + 1
    with _opened(path) as (container, stream):
        orientation = None
        for number, frame in enumerate(islice(_decoded(container, stream, path, warn), stop)):
            if orientation is None:
                orientation = _orientation(frame, container, path)
            if number % stride == 0:
                yield number, _upright_array(_rgb(frame, path), orientation)


def probe_video(path: str | Path) -> VideoInfo:
    """Describe a video file; decodes its first frame, so a file that passes can be read."""
    path = Path(path)
    with _opened(path) as (container, stream):
        frame = next(_decoded(container, stream, path))
        orientation = _orientation(frame, container, path)
        swapped = orientation[0] == 0
        still = _is_still(container, path)
        return VideoInfo(
            frames=1 if still else (stream.frames or None),
            width=frame.height if swapped else frame.width,
            height=frame.width if swapped else frame.height,
            fps=0.0 if still else float(stream.average_rate or stream.guessed_rate or 0),
            duration=None if still else _duration_seconds(container, stream),
            rotation=_rotation_degrees(orientation),
        )


def write_video(path: str | Path, frames: torch.Tensor, fps: float = 16, crf: int = 18, lossless: bool = False) -> Path:
    """Write `(T, 3, H, W)` frames (uint8, or float in [0, 1]) as an H.264 mp4; returns the path.

    The default is yuv420p, which plays everywhere and needs even sizes: an odd height or width is padded by
    repeating the last row or column. `lossless=True` stores RGB as it is: any size, read back bit for bit,
    but few players show it. The file is written beside its place and renamed, so it appears only complete.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise DataError(f"{path}: videos are written as .mp4")
    if not fps > 0:
        raise ConfigError(f"fps must be above 0, not {fps}")
    pixels = _as_uint8(frames, path)
    height, width = pixels.shape[-2:]
    if not lossless:
        # Replicate padding wants floats; uint8 survives the trip through float32 exactly.
        pad = (0, width % 2, 0, height % 2)
        pixels = F.pad(pixels.float(), pad, mode="replicate").to(torch.uint8) if any(pad) else pixels
    with written_whole(path) as part:
        try:
            _encode(part, pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy(), fps, crf, lossless)
        except av.error.FFmpegError as error:
            raise DataError(f"{path}: cannot be written: {_reason(error)}") from error
    return path


def _as_uint8(frames: torch.Tensor, path: Path) -> torch.Tensor:
    """Frames as uint8 `(T, 3, H, W)`, from uint8 or from floats in [0, 1] (rounded, clamped)."""
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise DataError(f"{path}: frames to write must be (T, 3, H, W), not {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise DataError(f"{path}: frames to write must be uint8 or float in [0, 1], not {frames.dtype}")
    pixels = frames.detach().float()
    if not torch.isfinite(pixels).all():
        raise DataError(f"{path}: frames to write hold NaN or infinite pixels")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _encode(path: Path, pixels: np.ndarray, fps: float, crf: int, lossless: bool) -> None:
    """Encode uint8 `(T, H, W, 3)` into a new mp4 file."""
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
            # Without these tags players guess the colour matrix from the size, and small videos look tinted.
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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; anything that hinders becomes a DataError that names the file."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if not path.is_file():
            raise DataError(f"{path}: not a regular file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
        # FFmpeg gets a handle without a name: a path can then never be taken for a URL, a protocol or a
        # number pattern of images, and the format is told by content alone.
        with open(os.open(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123
            try:
                options = {"format_whitelist": _DEMUXERS}
                container = av.open(file, "r", options=options, metadata_errors="replace")
            except av.error.ArgumentError as error:  # FFmpeg's answer to a format that is not on the list
                raise DataError(f"{path}: not a known video or image format") from error
            with container:
                yield container, _video_stream(container, path)
    except (av.error.FFmpegError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a video: {_reason(error)}") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream of moving pictures; cover art in an audio file is not one."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    if container.streams.audio:
        raise DataError(f"{path}: no video stream in it, only audio")
    raise DataError(f"{path}: no video stream in it: it has no frames, or is cut off or damaged")


def _decoded(
    container: InputContainer, stream: VideoStream, path: Path, warn: Callable[[str], None] | None = None
) -> Iterator[VideoFrame]:
    """The stream's frames, at least one; a stream that breaks off later ends there, with a warning.

    Of a picture it is the first: phones put others behind it (a gain map, a preview), which are not of a clip.
    """
    warn = warn or (lambda reason: logger.warning("%s: %s", path, reason))
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            if _is_still(container, path):
                return
            count += 1
    except av.error.FFmpegError as error:
        if count == 0:
            raise DataError(f"{path}: the first frame cannot be decoded: {_reason(error)}") from error
        warn(f"damaged after {count} frames ({_reason(error)}): those are used")
        return
    if count == 0:
        raise DataError(f"{path}: the video has no frames")
    if count < stream.frames:
        warn(f"only {count} of its {stream.frames} frames can be decoded")


def _rgb(frame: VideoFrame, path: Path) -> np.ndarray:
    """A decoded frame of any pixel format as uint8 `(H, W, 3)`, by its own colour matrix and range."""
    if frame.width * frame.height > _MAX_FRAME_PIXELS:
        raise DataError(f"{path}: a frame of {frame.width}x{frame.height} pixels is too large, or the file is damaged")
    return cast(np.ndarray, frame.to_ndarray(format="rgb24"))


def _orientation(frame: VideoFrame, container: InputContainer, path: Path) -> _Orientation:
    """How the stored picture is turned and mirrored to become upright."""
    if _is_still(container, path):
        with Image.open(path) as image:
            return _BY_EXIF.get(image.getexif().get(_EXIF_ORIENTATION, 1), _UPRIGHT)
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV stumbles over any side data newer than it knows; it still tells the rotation
        return _BY_ROTATION.get(frame.rotation % 360, _UPRIGHT)
    if matrix is None:
        return _UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32, count=5).astype(np.float64) / 65536
    if not any((a, b, c, d)):
        return _UPRIGHT  # written by some muxers where they mean "none"
    orientation: _Orientation = (round(a), round(b), round(c), round(d))
    if orientation not in {*_BY_ROTATION.values(), *_BY_EXIF.values()}:
        raise DataError(f"{path}: its display matrix turns by {frame.rotation} degrees or scales; not a quarter turn")
    return orientation


def _upright(video: torch.Tensor, orientation: _Orientation) -> torch.Tensor:
    """Turn and mirror the last two dimensions of `(…, H, W)` as the orientation says."""
    a, b, c, d = orientation
    if a == 0:
        video, x_sign, y_sign = video.transpose(-1, -2), c, b
    else:
        x_sign, y_sign = a, d
    return video.flip([dim for dim, sign in ((-1, x_sign), (-2, y_sign)) if sign < 0])


def _upright_array(picture: np.ndarray, orientation: _Orientation) -> np.ndarray:
    """`_upright` of one `(H, W, 3)` picture."""
    if orientation == _UPRIGHT:
        return picture
    return _upright(torch.from_numpy(picture).permute(2, 0, 1), orientation).permute(1, 2, 0).contiguous().numpy()


def _rotation_degrees(orientation: _Orientation) -> int:
    """The counter-clockwise turn of an orientation, its mirroring (left to right, after it) taken off."""
    a, b, c, d = orientation
    mirrored = a * d - b * c < 0
    return round(math.degrees(math.atan2(-b, -a if mirrored else a))) % 360


def _is_still(container: InputContainer, path: Path) -> bool:
    """Whether the file is a picture: FFmpeg reads those through demuxers named png_pipe, jpeg_pipe, …

    Several small JPEGs in one file are to FFmpeg a motion JPEG; whether they are one is for the name to say.
    """
    name = container.format.name
    return name.endswith("_pipe") or (name == "mjpeg" and path.suffix.lower() in IMAGE_SUFFIXES)


def _duration_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _reason(error: Exception) -> str:
    """The cause in words, without FFmpeg's error number and without the nameless handle's name."""
    if isinstance(error, av.error.EOFError):
        return "it ends with no frames read"
    return getattr(error, "strerror", None) or str(error)
