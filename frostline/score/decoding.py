"""Videos decoded ahead of the scoring, in a thread of its own, a bounded number of bytes ahead."""

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
    """A video to decode. key: by which its events tell whose they are. fault: why it need not be tried."""

    key: int
    path: str
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive frames of one size. key: of their video. numbers: in the file. frames: (n, 3, H, W) uint8."""

    key: int
    numbers: tuple[int, ...]
    frames: Tensor


@dataclass(frozen=True)
class End:
    """A video has no more frames. error: why it could not be read. note: why it broke off. seconds: of decoding."""

    key: int
    error: str = ""
    note: str = ""
    seconds: float = 0.0


Event = Chunk | End


@contextmanager
def decoded(
    sources: Iterable[Source], stride: int, max_frames: int | None, limits: DownloadLimits = DEFAULT_LIMITS
) -> Iterator[Iterator[Event]]:
    """What is in the videos: for each its chunks, then its end, in their order.

    At most `_CHUNKS_AHEAD` chunks are waiting at any time, and of large frames one. Leaving the block ends the thread.
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
    """A queue that counts a chunk as often as it has `_CHUNK_BYTES`."""

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
        # Of a URL the copy is no name that anybody knows.
        error = str(raised).replace(file, path)
    except MemoryError:
        error = f"{path}: its frames do not fit into memory"
    except Exception as raised:  # a file that the decoder stumbles over must not stop the others
        error = f"{path}: cannot be decoded: {raised}"
    yield End(key, error, "; ".join(notes), seconds + time.perf_counter() - start)


def _full(waiting: list[tuple[int, np.ndarray]]) -> bool:
    return len(waiting) >= _CHUNK_FRAMES or len(waiting) * waiting[0][1].nbytes >= _CHUNK_BYTES


def _chunk(key: int, waiting: list[tuple[int, np.ndarray]]) -> Chunk:
    numbers, pictures = zip(*waiting, strict=True)
    # By numpy: torch would open a second pool of threads here.
    return Chunk(key, numbers, torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))))
