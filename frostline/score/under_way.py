"""Keep the state of videos and references while their frames are decoded and scored."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from frostline.score.decoding import Chunk, End, Source
from frostline.score.faults import Fault, fault_of
from frostline.score.request import Pair
from frostline.score.rewards.base import ReferenceTrack, ScoredReward, Track, VideoTrack


@dataclass
class ReferenceUnderWay:
    """The state of a reference.

    Attributes:
        pair: the first pair with this reference.
        tracks: the state of each reward, by label.
        error: the reason if the reference could not be decoded.
        note: remarks of the decoder and the rewards.
    """

    pair: Pair
    tracks: dict[str, ReferenceTrack]
    error: str = ""
    note: str = ""

    def fault(self, reward: ScoredReward) -> str:
        """Return the reason if a reward cannot use the reference; otherwise an empty string."""
        fault = self.error or self.tracks[reward.label].fault
        return f"the reference cannot be used: {fault}" if fault else ""

    def end(self, end: End, rewards: Sequence[ScoredReward]) -> None:
        """Finish the reference after its last frame."""
        self.error = end.error
        for reward in rewards:
            track = self.tracks.get(reward.label)
            if track is None or track.fault or end.error:
                continue
            try:
                track.finish()
            except Exception as error:
                track.fault = fault_of(reward, error)
        notes = [end.note, *(track.note for track in self.tracks.values())]
        self.note = "; ".join(dict.fromkeys(filter(None, notes)))


@dataclass
class VideoUnderWay:
    """The state of a video.

    Attributes:
        pair: the pair of the video.
        tracks: the state of each reward, by label.
        frames: the number of frames so far.
        size: width and height in pixels.
        seconds: the duration of computation so far.
    """

    pair: Pair
    tracks: dict[str, VideoTrack] = field(default_factory=dict)
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class References:
    """Cache the last `most` finished references for later videos."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[tuple[str, str], ReferenceUnderWay] = {}

    def get(self, name: tuple[str, str]) -> ReferenceUnderWay | None:
        """Return the reference with this name; None if it is not in the cache."""
        return self._kept.get(name)

    def put(self, name: tuple[str, str], reference: ReferenceUnderWay) -> None:
        """Add a reference; if the cache is full, the oldest one is removed."""
        self._kept.pop(name, None)
        self._kept[name] = reference
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]


class UnderWay:
    """Keep the state of all unfinished videos and references. Keys are assigned in decoding order, from 0.

    Args:
        pairs: the pairs to score.
        rewards: the rewards to score them with.
        kept: the cache of references; None to keep none.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        rewards: Sequence[ScoredReward],
        kept: References | None = None,
    ) -> None:
        self._pairs = pairs
        self._kept = References(0) if kept is None else kept
        self._rewards = rewards
        self._with_reference = [reward for reward in rewards if reward.needs_reference]
        self._by_prompt = any(reward.references_depend_on_prompts for reward in rewards)
        self._jobs: dict[int, VideoUnderWay | ReferenceUnderWay] = {}
        self._references: dict[tuple[str, str], ReferenceUnderWay] = {}
        # The number of videos that still need each reference; at 0, the reference is moved to the cache.
        self._awaited = Counter(self._name(pair) for pair in pairs if not pair.fault)

    def sources(self) -> Iterator[Source]:
        """Yield all videos and references to decode, each reference before the first video that needs it.

        Runs in the decoding thread.
        """
        keys = itertools.count()
        for pair in self._pairs:
            if self._with_reference and not pair.fault and (kept := self._kept.get(self._name(pair))) is not None:
                self._references.setdefault(self._name(pair), kept)
            if self._with_reference and not pair.fault and self._name(pair) not in self._references:
                tracks = {reward.label: reward.reference(pair) for reward in self._with_reference}
                self._references[self._name(pair)] = reference = ReferenceUnderWay(pair, tracks)
                self._jobs[key := next(keys)] = reference
                yield Source(key, pair.reference)
            self._jobs[key := next(keys)] = VideoUnderWay(pair)
            yield Source(key, pair.video, pair.fault)

    def track(self, reward: ScoredReward, chunk: Chunk) -> Track | None:
        """Return the state of a reward for the video or reference of a chunk; None if the reward does not use it."""
        job = self._jobs[chunk.key]
        if isinstance(job, VideoUnderWay) and reward.label not in job.tracks:
            reference = self._references[self._name(job.pair)].tracks if reward.needs_reference else {}
            job.tracks[reward.label] = reward.video(job.pair, reference.get(reward.label))
        return job.tracks.get(reward.label)

    def add(self, chunk: Chunk, seen: Iterable[tuple[ScoredReward, Any]]) -> None:
        """Add the observations of the rewards for a chunk."""
        job = self._jobs[chunk.key]
        path = job.pair.video if isinstance(job, VideoUnderWay) else job.pair.reference
        for reward, part in seen:
            track = job.tracks.get(reward.label)
            if track is None or track.fault:
                continue
            if isinstance(part, Fault):
                track.fault = f"{path}: {part.reason}"
            elif not isinstance(job, VideoUnderWay) or not self._is_of_no_use(job, reward):
                track.add(chunk, part)

    def spend(self, chunk: Chunk, seconds: float) -> None:
        """Add the number of frames of a chunk, and the seconds of its computation."""
        job = self._jobs[chunk.key]
        if isinstance(job, VideoUnderWay):
            job.frames += len(chunk.numbers)
            job.size = (chunk.frames.shape[-1], chunk.frames.shape[-2])
            job.seconds += seconds

    def end(self, end: End) -> tuple[VideoUnderWay, End, ReferenceUnderWay | None] | None:
        """Finish a video or a reference.

        Returns:
            The video, its end and its reference (None if it has none); None if `end` is the end of a reference.
        """
        job = self._jobs.pop(end.key)
        if isinstance(job, ReferenceUnderWay):
            job.end(end, self._with_reference)
            return None
        if job.pair.fault or not self._with_reference:
            return job, end, None
        name = self._name(job.pair)
        reference = self._references[name]
        self._awaited[name] -= 1
        if not self._awaited[name]:
            self._kept.put(name, self._references.pop(name))
        return job, end, reference

    def _is_of_no_use(self, video: VideoUnderWay, reward: ScoredReward) -> bool:
        """Return whether the video cannot be scored because its reference has a fault."""
        return reward.needs_reference and bool(self._references[self._name(video.pair)].fault(reward))

    def _name(self, pair: Pair) -> tuple[str, str]:
        """Return the key of a reference; includes the prompt if references depend on it."""
        return pair.reference, pair.prompt if self._by_prompt else ""
