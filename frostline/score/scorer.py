"""From decoded frames to scores: batches across the borders of videos, results in the order of the input."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from frostline.allocation import is_out_of_memory
from frostline.models.faces.identity import FaceChoice, FaceIdentity, FrameFaces
from frostline.score.accumulate import ReferenceSum, VideoFrames
from frostline.score.decoding import Chunk, End, Event, Source, decoded
from frostline.score.request import Pair
from frostline.score.result import REFERENCE_NOTE, VideoScore
from frostline.score.settings import ScoreSettings

_BATCH_BYTES = 64 * 2**20  # of pixels: fewer frames go together where they are large


class Scorer:
    """Scores videos as the reward of training does, with the networks that the identity reward was given.

    Args:
        identity: its detector and reference embedder do the work.
        settings: what the results depend on.
        batch: frames of one call of the detector.
        device: where the networks are.
        backends: tells what served `face_detector` and `face_embedder`, as results name it.
        names: of detector and embedder.
    """

    def __init__(
        self,
        identity: FaceIdentity,
        settings: ScoreSettings,
        batch: int,
        device: torch.device,
        names: tuple[str, str],
        backends: Callable[[], tuple[str, str]] = lambda: ("torch", "torch"),
    ) -> None:
        self.identity = identity
        self.settings = settings
        self.batch = batch
        self.device = device
        self.names = names
        self.backends = backends

    def score(self, pairs: Sequence[Pair], on_frames: Callable[[int], None] = lambda n: None) -> Iterator[VideoScore]:
        """One result for each pair, in their order, as soon as it is known; no fault of a video stops the others.

        Args:
            on_frames: told how many more frames were scored.
        """
        state = _State(pairs, self.settings.face)
        with decoded(state.sources(), self.settings.every, self.settings.max_frames) as events:
            for group in _groups(events, self.batch):
                start = time.perf_counter()
                seen = iter(self._see([event.frames for event in group if isinstance(event, Chunk)]))
                seconds = time.perf_counter() - start
                frames = sum(len(event.numbers) for event in group if isinstance(event, Chunk))
                for event in group:
                    if isinstance(event, Chunk):
                        state.add(event, next(seen), seconds * len(event.numbers) / frames)
                    elif (ended := state.end(event)) is not None:
                        yield self._result(*ended)
                on_frames(frames)

    def _see(self, chunks: Sequence[Tensor]) -> list[FrameFaces | None]:
        """What is in each chunk of a group; None where the memory does not suffice for it."""
        if not chunks:
            return []
        try:
            frames = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
            seen = FrameFaces.join([self.identity.observe(part.to(self.device)) for part in frames.split(self.batch)])
            return [*seen.split([len(chunk) for chunk in chunks])]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out of the block above, in which the error keeps what it had allocated. Each by itself: one file is at fault.
        return [None] if len(chunks) == 1 else [seen for chunk in chunks for seen in self._see([chunk])]

    def _result(self, video: VideoFrames, end: End, reference: ReferenceSum) -> VideoScore:
        detector, embedder = self.backends()
        error = end.error or reference.error
        of_reference = f"{REFERENCE_NOTE}{reference.note}" if reference.note else ""
        return VideoScore(
            index=video.pair.index,
            video=video.pair.video,
            reference=video.pair.reference,
            prompt=video.pair.prompt,
            status="error" if error else "ok",
            error=error,
            note="; ".join(filter(None, (end.note, of_reference))),
            seconds=round(video.seconds + end.seconds, 4),
            face_detector=self.names[0],
            face_detector_backend=detector,
            face_embedder=self.names[1],
            face_embedder_backend=embedder,
            settings=str(self.settings),
            **({} if error else video.columns(self.settings.missing_face)),
        )


class _State:
    """Videos and references under way. Keys count upwards in the order in which things are decoded."""

    def __init__(self, pairs: Sequence[Pair], face: FaceChoice) -> None:
        self._pairs = pairs
        self._face: FaceChoice = face
        self._jobs: dict[int, Pair | str] = {}
        self._references: dict[str, ReferenceSum] = {}
        self._videos: dict[int, VideoFrames] = {}
        self._faults: dict[int, str] = {}

    def sources(self) -> Iterator[Source]:
        """All that is to be decoded: each reference before the first video that needs it. Runs in another thread."""
        keys = itertools.count()
        for pair in self._pairs:
            if not pair.fault and pair.reference not in self._references:
                self._references[pair.reference] = ReferenceSum()
                self._jobs[key := next(keys)] = pair.reference
                yield Source(key, pair.reference)
            self._jobs[key := next(keys)] = pair
            yield Source(key, pair.video, pair.fault)

    def add(self, chunk: Chunk, seen: FrameFaces | None, seconds: float) -> None:
        """What was seen in the frames of a chunk, and what that took; None where it was too much for the memory."""
        job = self._jobs[chunk.key]
        if seen is None:
            path = job if isinstance(job, str) else job.video
            width, height = chunk.frames.shape[-1], chunk.frames.shape[-2]
            self._faults[chunk.key] = f"{path}: frames of {width}x{height} need more memory than there is"
        if chunk.key in self._faults or seen is None:
            return
        if isinstance(job, str):
            self._references[job].add(seen)
            return
        reference = self._references[job.reference]
        video = self._videos.setdefault(chunk.key, VideoFrames(job))
        video.seconds += seconds
        if not reference.error:
            video.add(chunk, seen, reference.mean, self._face)

    def end(self, end: End) -> tuple[VideoFrames, End, ReferenceSum] | None:
        """A video that can be given its result, with its reference; None where a reference ends."""
        job = self._jobs.pop(end.key)
        if fault := self._faults.pop(end.key, ""):
            end = replace(end, error=fault)
        if isinstance(job, str):
            self._references[job].end(end.error, end.note, job)
            return None
        reference = ReferenceSum() if job.fault else self._references[job.reference]
        return self._videos.pop(end.key, VideoFrames(job)), end, reference


def _groups(events: Iterable[Event], batch: int) -> Iterator[list[Event]]:
    """The events in their order, as many together as make a batch of frames of one size."""
    group: list[Event] = []
    shape, frames = None, 0
    for event in events:
        if isinstance(event, Chunk):
            own = event.frames.shape[1:]
            full = frames >= batch or frames * own.numel() >= _BATCH_BYTES
            if frames and (own != shape or full):
                yield group
                group, frames = [], 0
            shape, frames = own, frames + len(event.numbers)
        group.append(event)
    yield group
