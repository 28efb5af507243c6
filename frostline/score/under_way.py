"""Videos and references while their frames come in, each on its way through all rewards at once."""

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
    """A reference under way. error: why it cannot be used at all."""

    pair: Pair
    tracks: dict[str, ReferenceTrack]
    error: str = ""
    note: str = ""

    def fault(self, reward: ScoredReward) -> str:
        """Why a reward cannot use it."""
        fault = self.error or self.tracks[reward.label].fault
        return f"the reference cannot be used: {fault}" if fault else ""

    def end(self, end: End, rewards: Sequence[ScoredReward]) -> None:
        """All of it was decoded."""
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
    """A video under way. size: width and height. seconds: of computing."""

    pair: Pair
    tracks: dict[str, VideoTrack] = field(default_factory=dict)
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class References:
    """The references that were finished last, at most `most` of them, for videos that come later."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[tuple[str, str], ReferenceUnderWay] = {}

    def get(self, name: tuple[str, str]) -> ReferenceUnderWay | None:
        """Return the reference that goes by a name, if it is kept."""
        return self._kept.get(name)

    def put(self, name: tuple[str, str], reference: ReferenceUnderWay) -> None:
        """Keep a reference, in place of the one that was kept first."""
        self._kept.pop(name, None)
        self._kept[name] = reference
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]


class UnderWay:
    """Videos and references under way. Keys count upwards in the order in which things are decoded."""

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
        # Whoever needs a reference last lets it go.
        self._awaited = Counter(self._name(pair) for pair in pairs if not pair.fault)

    def sources(self) -> Iterator[Source]:
        """All that is to be decoded: each reference before the first video that needs it. Runs in another thread."""
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
        """That of a reward on what a chunk is of; None where it does not look at it."""
        job = self._jobs[chunk.key]
        if isinstance(job, VideoUnderWay) and reward.label not in job.tracks:
            reference = self._references[self._name(job.pair)].tracks if reward.needs_reference else {}
            job.tracks[reward.label] = reward.video(job.pair, reference.get(reward.label))
        return job.tracks.get(reward.label)

    def add(self, chunk: Chunk, seen: Iterable[tuple[ScoredReward, Any]]) -> None:
        """Keep what the rewards saw in the frames of a chunk."""
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
        """Count the frames of a chunk, and what they took."""
        job = self._jobs[chunk.key]
        if isinstance(job, VideoUnderWay):
            job.frames += len(chunk.numbers)
            job.size = (chunk.frames.shape[-1], chunk.frames.shape[-2])
            job.seconds += seconds

    def end(self, end: End) -> tuple[VideoUnderWay, End, ReferenceUnderWay | None] | None:
        """A video that can be given its result, with its reference; None where a reference ends."""
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
        """Whether the reference, which ended before, has a fault."""
        return reward.needs_reference and bool(self._references[self._name(video.pair)].fault(reward))

    def _name(self, pair: Pair) -> tuple[str, str]:
        """By what references are told apart."""
        return pair.reference, pair.prompt if self._by_prompt else ""
