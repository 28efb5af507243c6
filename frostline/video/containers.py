"""Read video files with PyAV: all decodable frames of the stream that a player shows, as displayed."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from frostline.errors import DataError

from .info import MAX_FRAME_PIXELS, VideoInfo, check_size
from .orientation import BY_EXIF, BY_ROTATION, UPRIGHT, Orientation, rotation_degrees, swaps_sides, upright

# Supported demuxers. Playlists (HLS, DASH, concat) are excluded: they make a file read other files, or the network.
# Audio demuxers are included only to report that a file is an audio file.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,ivf,flv,ogg,asf,mjpeg,yuv4mpegpipe,"
    "mp3,wav,flac,aac"
)
# These containers state the duration in their headers; for others, FFmpeg measures the available content.
_STATING_DURATION = ("matroska", "flv")
_UNKNOWN_OR_PROGRESSIVE = (0, 1)  # values of `field_order`
_VP8_SHOWN = 0x10  # in a packet's first byte
_MPEG4_SAME_AGAIN_BYTES = 8


@contextmanager
def opened_container(file: BinaryIO, path: Path) -> Iterator["Container"]:
    """Open a video file.

    Raises:
        DataError: it is not a video, has no video stream that can be decoded, or its frames are too large.
        FFmpegError: it is damaged.
    """
    # FFmpeg gets a file object without a name, so that a path cannot be interpreted as a URL, a protocol or an image
    # sequence pattern, and the format is detected from the content alone.
    try:
        options = {"format_whitelist": _DEMUXERS}
        container = av.open(file, "r", options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:  # FFmpeg's error for a format that is not in the list
        raise DataError(f"{path}: not a known video or image format") from error
    with container:
        yield Container(container, path)


class Container:
    """An open video file.

    Attributes:
        notes: warnings for the user.
    """

    def __init__(self, container: InputContainer, path: Path) -> None:
        self._container = container
        self._path = path
        self._stream, self.notes = _shown_stream(container, path)
        context = self._stream.codec_context
        check_size(context.width, context.height, path)
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        self._codec = context.codec.canonical_name
        self._packets = self._frames = self._failed = self._damaged = 0
        self._end_seconds = 0.0
        self._at_end = False
        self._reason = ""

    def info(self) -> VideoInfo:
        """Describe the video; decodes its first frame."""
        frame = next(self._decoded())
        orientation, (width, height) = self._orientation(frame), self._displayed_size(frame)
        stream = self._stream
        return VideoInfo(
            frames=self._counted_frames() or stream.frames or None,
            width=height if swaps_sides(orientation) else width,
            height=width if swaps_sides(orientation) else height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            duration=self._duration_seconds(),
            rotation=rotation_degrees(orientation),
        )

    def count(self, limit: int) -> int:
        """Count the frames, up to `limit`, without decoding them."""
        if counted := self._counted_frames():
            return min(counted, limit)
        for _ in self._demuxed():
            if self._packets >= limit:
                break
        return min(self._packets, limit)

    def frames(self, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every Nth frame as (number, uint8 `(H, W, 3)`), RGB, upright and in square pixels."""
        orientation: Orientation | None = None
        for number, frame in enumerate(self._decoded()):
            if orientation is None:
                orientation = self._orientation(frame)
            if number % stride == 0:
                yield number, upright(self._rgb(frame), orientation)

    def losses(self) -> list[str]:
        """Return messages about the frames that were lost so far; complete once `frames` is exhausted."""
        lost, what = self._failed, "of its frames"
        if self._at_end and (expected := self._expected_frames()):
            lost, what = max(0, expected - self._frames), f"of its {expected} frames"
        reason = f" ({self._reason})" if self._reason else ""
        said = [f"{lost} {what} cannot be decoded{reason}: using the others"] if lost else []
        if self._damaged:
            said.append(f"{self._damaged} of its frames are damaged: using them as the decoder repaired them")
        return said + self._missing_end()

    def _demuxed(self) -> Iterator[Packet]:
        """Yield the stream's packets, up to the point where the container is truncated."""
        try:
            # Read all streams, to find the time at which the file ends.
            for packet in self._container.demux():
                if packet.pts is not None and packet.time_base:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._end_seconds = max(self._end_seconds, end)
                if packet.stream_index == self._stream.index:
                    self._packets += _is_a_frame(packet, self._codec)
                    yield packet
        except av.error.FFmpegError as error:
            self._reason = reason_of(error)

    def _decoded(self) -> Iterator[VideoFrame]:
        """Yield every decodable frame, at least one; a damaged packet does not affect others.

        Raises:
            DataError: no frame can be decoded.
        """
        for packet in self._demuxed():
            yield from self._frames_of(packet)
        yield from self._frames_of(None)
        self._at_end = True
        if self._frames == 0:
            if self._reason:
                raise DataError(f"{self._path}: no frame can be decoded: {self._reason}")
            raise DataError(f"{self._path}: the video has no frames")

    def _frames_of(self, packet: Packet | None) -> Iterator[VideoFrame]:
        """Yield the frames of a packet; None flushes the decoder."""
        try:
            frames = cast("list[VideoFrame]", self._stream.decode(packet))
        except av.error.EOFError:  # the decoder has already been flushed
            return
        except av.error.FFmpegError as error:
            self._failed += 1
            self._reason = reason_of(error)
            return
        for frame in frames:
            self._frames += 1
            self._damaged += frame.is_corrupt
            yield frame

    def _counted_frames(self) -> int | None:
        """Return the number of displayed frames in the container's index; None without a complete index."""
        if "mov" not in self._container.format.name or not (self._stream.frames or self._at_end):
            return None
        # Edit lists are applied: frames that they hide are marked or omitted.
        return sum(not entry.is_discard for entry in self._stream.index_entries) or None

    def _expected_frames(self) -> int | None:
        """Return the expected number of frames, from the index or the packets; None if unknown."""
        if (counted := self._counted_frames()) is not None:
            return counted
        # In interlaced video, two packets may form one frame.
        whole = self._stream.codec_context.field_order in _UNKNOWN_OR_PROGRESSIVE
        return self._packets if whole and self._packets >= self._frames else None

    def _missing_end(self) -> list[str]:
        stated, rate = self._stated_seconds(), float(self._stream.average_rate or 0)
        if not self._at_end or not rate or stated is None or stated - self._end_seconds < 1.5 / rate:
            return []
        return [f"it ends after {self._end_seconds:.2f} of {stated:.2f} seconds: using the available part"]

    def _stated_seconds(self) -> float | None:
        """Return the duration in the file's header, if it states one."""
        name, stream = self._container.format.name, self._stream
        if name == "avi" and stream.frames and stream.average_rate:
            return float(stream.frames / stream.average_rate)
        if any(part in name for part in _STATING_DURATION) and self._container.duration:
            return self._container.duration / av.time_base
        return None

    def _duration_seconds(self) -> float | None:
        stream = self._stream
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if self._container.duration is None else self._container.duration / av.time_base

    def _displayed_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return (width, height) in square pixels; a frame with other pixels is enlarged along one side."""
        ratio = self._stream.sample_aspect_ratio
        if not ratio or ratio < 0:
            return frame.width, frame.height
        return round(frame.width * max(ratio, Fraction(1))), round(frame.height / min(ratio, Fraction(1)))

    def _rgb(self, frame: VideoFrame) -> np.ndarray:
        """Convert a decoded frame of any pixel format to uint8 `(H, W, 3)`, using its colour matrix and range."""
        width, height = self._displayed_size(frame)
        check_size(width, height, self._path)
        if (width, height) == (frame.width, frame.height):
            return cast(np.ndarray, frame.to_ndarray(format="rgb24"))
        stretched = frame.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        return cast(np.ndarray, stretched.to_ndarray())

    def _orientation(self, frame: VideoFrame) -> Orientation:
        """Return how the stored picture must be rotated and mirrored to be upright."""
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # PyAV does not support newer types of side data; the rotation is still available
            return BY_ROTATION.get(frame.rotation % 360, UPRIGHT)
        if matrix is None:
            return UPRIGHT
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32, count=5).astype(np.float64) / 65536
        if not any((a, b, c, d)):
            return UPRIGHT  # written by some muxers where they mean "none"
        orientation: Orientation = (round(a), round(b), round(c), round(d))
        if orientation not in {*BY_ROTATION.values(), *BY_EXIF.values()}:
            raise DataError(
                f"{self._path}: its display matrix rotates by {frame.rotation} degrees or scales; only quarter turns "
                "and mirroring are supported"
            )
        return orientation


def reason_of(error: Exception) -> str:
    """Return the cause in words, without FFmpeg's error number and the placeholder name of the file object."""
    if isinstance(error, av.error.EOFError):
        return "no frames were read before the end of the file"
    return getattr(error, "strerror", None) or str(error)


def _shown_stream(container: InputContainer, path: Path) -> tuple[VideoStream, list[str]]:
    """Return the stream that players show, with a note if there are others; ignore cover art of an audio file."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        if container.streams.audio:
            raise DataError(f"{path}: contains no video stream, only audio")
        raise DataError(f"{path}: contains no video stream: it has no frames, or is truncated or damaged")
    best = container.streams.best("video")
    shown = next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])
    if shown.codec_context is None:
        raise DataError(f"{path}: this build of FFmpeg has no decoder for the video's codec")
    if len(streams) == 1:
        return shown, []
    return shown, [f"it has {len(streams)} video streams: using number {shown.index}, which players show"]


def _is_a_frame(packet: Packet, codec: str) -> bool:
    """Return whether a packet should produce a displayed frame."""
    if packet.size == 0 or packet.is_discard:
        return False
    if codec == "vp8":  # some pictures are not displayed: they are only references for others
        return bool(memoryview(packet)[0] & _VP8_SHOWN)
    return codec != "mpeg4" or packet.size > _MPEG4_SAME_AGAIN_BYTES
