"""Score decoded frames in batches that can span several videos; return results in the order of the input."""

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

_BATCH_BYTES = 64 * 2**20  # maximum size of a batch, so that batches of large frames have fewer frames
_NO_PROMPT = "needs a prompt, but the video has none (set --prompt, or add a column 'prompt' to the file of --pairs)"


class Scorer:
    """Score videos with rewards. Each frame is decoded once for all rewards.

    Args:
        rewards: the rewards with their networks.
        settings: the settings that the results depend on.
        batch: the number of frames to collect before the rewards run. A batch has fewer frames at the end of the input,
            before frames of another size, or if its frames take 64 MiB. It can have more, because chunks are not split.
        limits: limits for videos at URLs.
        keep_references: the number of references to keep between calls of `score`.
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
        """Yield one result for each pair, in order, as soon as it is available. A video that fails has an error row.

        Args:
            pairs: the pairs to score.
            on_frames: called with the number of frames after each batch.
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
        """Return the observation of a reward for each chunk; a `Fault` if it failed, None if it is not needed."""
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
        """Return the result of a reward for a video after its last frame."""
        track = video.tracks.get(reward.label)
        if "prompt" in reward.active.config.needs and not video.pair.prompt:
            return RewardResult(fault=_NO_PROMPT)
        if reward.needs_reference and reference is not None and (fault := reference.fault(reward)):
            return RewardResult(fault=fault)
        if track is None or track.fault:
            return RewardResult(fault=track.fault if track else "the video has no frames")
        try:
            return track.result()
        except Exception as error:
            return RewardResult(fault=fault_of(reward, error))

    def _backends(self) -> str:
        """Return the backends of the rewards that have no separate columns for them."""
        return " ".join(
            f"{reward.label}.{stage}={backend}"
            for reward in self.rewards
            if not reward.provenance()
            for stage, backend in reward.backends().items()
        )


def _observe(reward: ScoredReward, parts: Sequence[tuple[Tensor, Chunk]]) -> Sequence[Any]:
    """Return the observations of a reward for all parts. If the batch fails, each part is tried alone.

    This way, an invalid file does not affect the other files of its batch.
    """
    if not parts:
        return []
    try:
        return reward.observe([part for part, _ in parts])
    except Exception as error:
        if len(parts) == 1:
            chunk = parts[0][1]
            return [Fault(fault_of(reward, error, f"{chunk.frames.shape[-1]}x{chunk.frames.shape[-2]}"))]
        fault_of(reward, error)
    # Outside of the `except` block, in which the exception keeps its allocated memory alive.
    return [seen for part in parts for seen in _observe(reward, [part])]


def _columns(video: VideoUnderWay, results: Sequence[RewardResult]) -> dict[str, Any]:
    """Return fields of `VideoScore`: the results of the rewards, and the number and size of the frames."""
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
    """Yield the events in order, in groups that make a batch of frames of the same size."""
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
