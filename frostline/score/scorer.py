"""From decoded frames to scores: batches across the borders of videos, results in the order of the input."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from frostline.score.decoding import Chunk, End, Event, decoded
from frostline.score.faults import Fault, fault_of
from frostline.score.request import Pair
from frostline.score.result import REFERENCE_NOTE, VideoScore
from frostline.score.rewards.base import RewardResult, ScoredReward
from frostline.score.settings import ScoreSettings
from frostline.score.under_way import References, ReferenceUnderWay, UnderWay, VideoUnderWay
from frostline.video.downloads import DEFAULT_LIMITS, DownloadLimits

_BATCH_BYTES = 64 * 2**20  # of pixels: fewer frames go together where they are large
_NO_PROMPT = "needs a prompt, which the video does not have (--prompt, or a column 'prompt' of --pairs)"


class Scorer:
    """Scores videos by rewards, each frame decoded once for all of them.

    Args:
        rewards: with the networks that they need.
        settings: what the results depend on.
        batch: frames that are looked at together, at least.
        limits: of videos at URLs.
        keep_references: how many references to keep from one call of `score` to the next.
    """

    def __init__(
        self,
        rewards: Sequence[ScoredReward],
        settings: ScoreSettings,
        batch: int,
        limits: DownloadLimits = DEFAULT_LIMITS,
        keep_references: int = 0,
    ) -> None:
        self.rewards = rewards
        self.settings = settings
        self.batch = batch
        self.limits = limits
        self._references = References(keep_references)

    def score(self, pairs: Sequence[Pair], on_frames: Callable[[int], None] = lambda n: None) -> Iterator[VideoScore]:
        """One result for each pair, in their order, as soon as it is known; no fault of a video stops the others.

        Args:
            on_frames: told how many more frames were scored.
        """
        state = UnderWay(pairs, self.rewards, self._references)
        with decoded(state.sources(), self.settings.every, self.settings.max_frames, self.limits) as events:
            for group in _groups(events, self.batch):
                start = time.perf_counter()
                chunks = [event for event in group if isinstance(event, Chunk)]
                seen = [(reward, iter(self._see(reward, state, chunks))) for reward in self.rewards]
                seconds = time.perf_counter() - start
                frames = sum(len(chunk.numbers) for chunk in chunks)
                for event in group:
                    if isinstance(event, Chunk):
                        state.add(event, [(reward, next(parts)) for reward, parts in seen])
                        state.spend(event, seconds * len(event.numbers) / frames)
                    elif (ended := state.end(event)) is not None:
                        yield self._row(*ended)
                on_frames(frames)

    def _see(self, reward: ScoredReward, state: UnderWay, chunks: Sequence[Chunk]) -> list[Any]:
        """What a reward sees in each chunk of a group; a `Fault` where it cannot look, None where it need not."""
        tracks = [state.track(reward, chunk) for chunk in chunks]
        wanted = [(track, chunk) for track, chunk in zip(tracks, chunks, strict=True) if track and not track.fault]
        parts = [(track.take(chunk), chunk) for track, chunk in wanted]
        seen = iter(_observe(reward, parts))
        return [next(seen) if track and not track.fault else None for track in tracks]

    def _row(self, video: VideoUnderWay, end: End, reference: ReferenceUnderWay | None) -> VideoScore:
        results = {} if end.error else {reward: self._result(reward, video, reference) for reward in self.rewards}
        faults = {reward.label: result.fault for reward, result in results.items() if result.fault}
        error = end.error
        if results and len(faults) == len(results):
            error = "; ".join(dict.fromkeys(faults.values())) if len({*faults.values()}) == 1 else _listed(faults)
        notes, scored = [end.note], {}
        if not error:
            notes.append(_listed({reward.label: result.fault or result.note for reward, result in results.items()}))
            scored = _columns(video, list(results.values()))
        if reference is not None and reference.note:
            notes.append(f"{REFERENCE_NOTE}{reference.note}")
        return VideoScore(
            index=video.pair.index,
            video=video.pair.video,
            reference=video.pair.reference,
            prompt=video.pair.prompt,
            status="error" if error else "ok",
            error=error,
            note="; ".join(filter(None, notes)),
            seconds=round(video.seconds + end.seconds, 4),
            settings=str(self.settings),
            backends=self._backends(),
            **{name: value for reward in self.rewards for name, value in reward.provenance().items()},
            **scored,
        )

    def _result(self, reward: ScoredReward, video: VideoUnderWay, reference: ReferenceUnderWay | None) -> RewardResult:
        """What a reward says of a video all of whose frames it has seen."""
        track = video.tracks.get(reward.label)
        if "prompt" in reward.active.config.needs and not video.pair.prompt:
            return RewardResult(fault=_NO_PROMPT)
        if reward.needs_reference and reference is not None and (fault := reference.fault(reward)):
            return RewardResult(fault=fault)
        if track is None or track.fault:
            return RewardResult(fault=track.fault if track else "was shown no frames")
        try:
            return track.result()
        except Exception as error:
            return RewardResult(fault=fault_of(reward, error))

    def _backends(self) -> str:
        """What computes the scores of rewards that have no columns of their own for it."""
        return " ".join(
            f"{reward.label}.{stage}={backend}"
            for reward in self.rewards
            if not reward.provenance()
            for stage, backend in reward.backends().items()
        )


def _observe(reward: ScoredReward, parts: Sequence[tuple[Tensor, Chunk]]) -> Sequence[Any]:
    """What a reward sees in each part; where it fails at all of them together, each by itself: one file is at fault."""
    if not parts:
        return []
    try:
        return reward.observe([part for part, _ in parts])
    except Exception as error:
        if len(parts) == 1:
            chunk = parts[0][1]
            return [Fault(fault_of(reward, error, f"{chunk.frames.shape[-1]}x{chunk.frames.shape[-2]}"))]
        fault_of(reward, error)
    # Out of the block above, in which the error keeps what it had allocated.
    return [seen for part in parts for seen in _observe(reward, [part])]


def _columns(video: VideoUnderWay, results: Sequence[RewardResult]) -> dict[str, Any]:
    """Fields of `VideoScore`: what the rewards say of a video, and what it is."""
    return {
        **{name: value for result in results for name, value in result.columns.items()},
        "scores": {name: value for result in results for name, value in result.scores.items()},
        "frames": video.frames,
        "width": video.size[0],
        "height": video.size[1],
    }


def _listed(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {text}" for label, text in texts.items() if text)


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
