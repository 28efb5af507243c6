"""From decoded frames to scores: batches across the borders of videos, results in the order of the input."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from frostline.models.faces.identity import FaceIdentity, FrameFaces
from frostline.score.accumulate import ReferenceSum, VideoFrames
from frostline.score.decoding import Chunk, End, Event, Source, decoded
from frostline.score.request import Pair
from frostline.score.result import VideoScore
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
        state = _State(pairs)
        with decoded(state.sources(), self.settings.every, self.settings.max_frames) as events:
            for group in _groups(events, self.batch):
                start = time.perf_counter()
                seen = iter(self._see(group))
                seconds = time.perf_counter() - start
                frames = sum(len(event.numbers) for event in group if isinstance(event, Chunk))
                for event in group:
                    if isinstance(event, Chunk):
                        state.add(event, next(seen), seconds * len(event.numbers) / frames)
                    elif (ended := state.end(event)) is not None:
                        yield self._result(*ended)
                on_frames(frames)

    def _see(self, group: Sequence[Event]) -> list[FrameFaces]:
        """What is in each chunk of a group."""
        chunks = [event.frames for event in group if isinstance(event, Chunk)]
        if not chunks:
            return []
        frames = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        seen = FrameFaces.join([self.identity.observe(part.to(self.device)) for part in frames.split(self.batch)])
        return seen.split([len(chunk) for chunk in chunks])

    def _result(self, video: VideoFrames, end: End, reference_error: str) -> VideoScore:
        detector, embedder = self.backends()
        error = end.error or reference_error
        return VideoScore(
            index=video.pair.index,
            video=video.pair.video,
            reference=video.pair.reference,
            prompt=video.pair.prompt,
            status="error" if error else "ok",
            error=error,
            note=end.note,
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

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._jobs: dict[int, Pair | str] = {}
        self._references: dict[str, ReferenceSum] = {}
        self._videos: dict[int, VideoFrames] = {}

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

    def add(self, chunk: Chunk, seen: FrameFaces, seconds: float) -> None:
        """What was seen in the frames of a chunk, and what that took."""
        job = self._jobs[chunk.key]
        if isinstance(job, str):
            self._references[job].add(seen.largest.found, seen.embeddings)
            return
        reference = self._references[job.reference]
        video = self._videos.setdefault(chunk.key, VideoFrames(job))
        video.seconds += seconds
        if not reference.error:
            video.add(chunk, seen, reference.mean)

    def end(self, end: End) -> tuple[VideoFrames, End, str] | None:
        """A video that can be given its result, with what is wrong with its reference; None where a reference ends."""
        job = self._jobs.pop(end.key)
        if isinstance(job, str):
            self._references[job].end(end.error, job)
            return None
        reference_error = "" if job.fault else self._references[job.reference].error
        return self._videos.pop(end.key, VideoFrames(job)), end, reference_error


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
