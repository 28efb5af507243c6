"""Decode videos in a background thread, with a bounded buffer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from frostline.errors import FrostlineError
from frostline.video import stream_video
from frostline.video.downloads import DEFAULT_LIMITS, DownloadLimits, local_copy

_CHUNK_BYTES = 8 * 2**20
_CHUNK_FRAMES = 32
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Source:
    """A video to decode.

    Attributes:
        key: identifies the events of this video.
        path: a path or URL.
        fault: the reason if the video cannot be scored; it is not decoded then.
    """

    key: int
    path: str
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Decoded frames in the order of the file, all of the same size.

    Attributes:
        key: the key of the video.
        numbers: the indices of the frames in the file.
        frames: (n, 3, H, W) uint8.
    """

    key: int
    numbers: tuple[int, ...]
    frames: Tensor


@dataclass(frozen=True)
class End:
    """The end of a video.

    Attributes:
        key: the key of the video.
        error: the reason if the video could not be read.
        note: remarks of the decoder, such as lost frames; empty if there are none.
        seconds: the duration of decoding.
    """

    key: int
    error: str = ""
    note: str = ""
    seconds: float = 0.0


Event = Chunk | End


@contextmanager
def decoded(
    sources: Iterable[Source], stride: int, max_frames: int | None, limits: DownloadLimits = DEFAULT_LIMITS
) -> Iterator[Iterator[Event]]:
    """Yield an iterator over the events of the videos in order: for each video its chunks, then its end.

    At most `_CHUNKS_AHEAD` chunks are buffered, or one chunk of very large frames. The thread stops when the block is
    left.

    Args:
        sources: the videos; iterated over in the thread.
        stride: decode every Nth frame.
        max_frames: the maximum number of frames per video; None for no limit.
        limits: limits for videos at URLs.
    """
    events = _Events(_CHUNKS_AHEAD)
    stopped = threading.Event()

    def put(event: Event | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                events.put(event, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for source in sources:
                if not all(put(event) for event in _events(source, stride, max_frames, limits, stopped.is_set)):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="decode", daemon=True)
    thread.start()
    try:
        yield _drain(events)
    finally:
        stopped.set()
        thread.join()


class _Events(queue.Queue["Event | BaseException | None"]):
    """A queue in which the size of a chunk is its number of bytes divided by `_CHUNK_BYTES`, at least 1."""

    def _qsize(self) -> int:
        return sum(max(1, item.frames.nbytes // _CHUNK_BYTES) if isinstance(item, Chunk) else 1 for item in self.queue)


def _drain(events: queue.Queue[Event | BaseException | None]) -> Iterator[Event]:
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield event


def _events(
    source: Source, stride: int, max_frames: int | None, limits: DownloadLimits, stopped: Callable[[], bool]
) -> Iterator[Event]:
    key, path = source.key, source.path
    if source.fault:
        yield End(key, source.fault)
        return
    notes: list[str] = []
    waiting: list[tuple[int, np.ndarray]] = []
    error, seconds, start, file = "", 0.0, time.perf_counter(), path
    try:
        with local_copy(path, limits) as file:
            for number, picture in stream_video(file, max_frames, stride, notes.append):
                if stopped():
                    return
                if waiting and (picture.shape != waiting[0][1].shape or _full(waiting)):
                    chunk = _chunk(key, waiting)
                    seconds += time.perf_counter() - start
                    yield chunk
                    start, waiting = time.perf_counter(), []
                waiting.append((number, picture))
        if waiting:
            yield _chunk(key, waiting)
    except FrostlineError as raised:
        # For a URL, the message contains the name of the temporary copy.
        error = str(raised).replace(file, path)
    except MemoryError:
        error = f"{path}: out of memory while decoding its frames"
    except Exception as raised:  # a file that cannot be decoded must not stop the run
        error = f"{path}: cannot be decoded: {raised}"
    yield End(key, error, "; ".join(notes), seconds + time.perf_counter() - start)


def _full(waiting: list[tuple[int, np.ndarray]]) -> bool:
    return len(waiting) >= _CHUNK_FRAMES or len(waiting) * waiting[0][1].nbytes >= _CHUNK_BYTES


def _chunk(key: int, waiting: list[tuple[int, np.ndarray]]) -> Chunk:
    numbers, pictures = zip(*waiting, strict=True)
    # numpy instead of torch, which would start a second thread pool in this thread.
    return Chunk(key, numbers, torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))))
