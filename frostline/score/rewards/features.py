"""Score rewards that pool features of frames. Features are computed during decoding, and frames are not kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from frostline.errors import DataError
from frostline.rewards.active import ActiveReward
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.frame_selection import evenly_spaced
from frostline.runtime.runtime import Runtime
from frostline.score.decoding import Chunk
from frostline.score.request import Pair
from frostline.score.rewards.base import ReferenceTrack, RewardResult, ScoredReward, VideoTrack

# The maximum number of prompts with cached embeddings.
_PROMPTS = 256


class FeatureReward(ScoredReward):
    """Score a `FrameReward`. Only the features of each frame are kept, so videos of any length can be scored.

    The setting `frames` selects among all frames of a scored video, including frame 0. Frame 0 of a reference video is
    not used, as in training, where it is the first frame of the generated video, unless the reward compares with that
    frame.
    """

    def __init__(self, label: str, active: ActiveReward, runtime: Runtime, device: torch.device, batch: int) -> None:
        super().__init__(label, active, runtime, device, batch)
        self.reward = cast(FrameReward, active.reward)
        self._of_prompts: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def reference(self, pair: Pair) -> FeatureReference:
        """Return the initial state of a reference, with the prompt if the reward needs it."""
        return FeatureReference(self, pair)

    def video(self, pair: Pair, reference: ReferenceTrack | None) -> FeatureVideo:
        """Return the initial state of a video."""
        assert reference is None or isinstance(reference, FeatureReference)
        return FeatureVideo(self, pair, reference)

    @torch.no_grad()
    def observe(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Compute the features of each part of n consecutive frames.

        Returns:
            For each part, (n - window + 1, D) float32 on the CPU; no rows if n is less than `window`.
        """
        window = self.reward.window
        joined = [part for part in parts if len(part) >= window]
        features = self._features(torch.cat(joined)) if joined else torch.zeros(0, 0)
        rows, start = [], 0
        for part in parts:
            if len(part) < window:
                rows.append(features[:0])
                continue
            # The rows in between are computed from frames of two parts, and are not used.
            rows.append(features[start : start + len(part) - window + 1])
            start += len(part)
        return rows

    def _features(self, frames: Tensor) -> Tensor:
        overlap = self.reward.window - 1
        runs = []
        for start in range(0, len(frames) - overlap, self.batch):
            run = frames[start : start + self.batch + overlap].to(self.device).float() / 255
            features = self.reward.features(run[None], self.run)[0]
            if len(features) != len(run) - overlap:
                raise DataError(
                    f"the reward returned {len(features)} rows of features for {len(run)} frames instead of "
                    f"{len(run) - overlap}"
                )
            runs.append(features.float().cpu())
        return torch.cat(runs)

    @torch.no_grad()
    def keep(self, features: Tensor | None, prompt: str) -> Mapping[str, Tensor]:
        """Compute the reward's tensors of a reference's features (R, D) and of a prompt."""
        given = None if features is None else features[None].to(self.device)
        return self.reward.reference(given, (prompt,), self.run)

    def of_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        """Return the reward's tensors of a prompt, from the cache if possible."""
        if prompt not in self._of_prompts:
            self._of_prompts[prompt] = self.keep(None, prompt)
            if len(self._of_prompts) > _PROMPTS:
                self._of_prompts.popitem(last=False)
        return self._of_prompts[prompt]

    @torch.no_grad()
    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardResult:
        """Score a video by its (T, D) features."""
        return self.result_of(self.reward.pool(features[None].to(self.device), references))


class _Features:
    """Collect the features of consecutive frames chunk by chunk."""

    def __init__(self, window: int) -> None:
        self.frames = 0
        self._overlap = window - 1
        self._rows: list[Tensor] = []
        self._tail: Tensor | None = None

    def take(self, frames: Tensor) -> Tensor:
        """Return the new frames, preceded by the last `window - 1` frames of the previous chunk."""
        self.frames += len(frames)
        if not self._overlap:
            return frames
        # Frames of different sizes are not consecutive.
        if self._tail is not None and self._tail.shape[1:] == frames.shape[1:]:
            frames = torch.cat([self._tail, frames])
        self._tail = frames[-self._overlap :].clone()
        return frames

    def add(self, rows: Tensor) -> None:
        """Add rows of features."""
        if len(rows):
            self._rows.append(rows)

    def joined(self) -> Tensor | None:
        """Return all rows, (T, D); None if there are too few frames."""
        return torch.cat(self._rows) if self._rows else None

    def too_few(self) -> str:
        """Return the error message for too few frames."""
        count = "is 1" if self.frames == 1 else f"are {self.frames}"
        return f"needs {self._overlap + 1} consecutive frames, but there {count}"


class FeatureReference(ReferenceTrack):
    """The state of a reference: its features; after `finish`, the reward's tensors of them."""

    def __init__(self, reward: FeatureReward, pair: Pair) -> None:
        super().__init__()
        self.reward = reward
        self.path = pair.reference
        self.prompt = reward.prompt_of(pair)
        self.kept: Mapping[str, Tensor] = {}
        self._features: _Features | None = _Features(reward.reward.window)

    def take(self, chunk: Chunk) -> Tensor:
        """Return the frames of the chunk; see `_Features.take`."""
        assert self._features is not None
        return self._features.take(chunk.frames)

    def add(self, chunk: Chunk, seen: Tensor) -> None:
        """Keep the features of a chunk."""
        assert self._features is not None
        self._features.add(seen)

    def finish(self) -> None:
        """Compute the reward's tensors of all frames, or of all frames after the first."""
        assert self._features is not None
        rows, frames, self._features = self._features.joined(), self._features, None
        if rows is not None and frames.frames > 1 and not self.reward.reward.uses_start:
            rows = rows[1:]
        if rows is None or not len(rows):
            self.fault = f"{self.path}: {frames.too_few()}"
        else:
            self.kept = self.reward.keep(rows, self.prompt)


class FeatureVideo(VideoTrack):
    """The state of a video: its features until they are pooled."""

    def __init__(self, reward: FeatureReward, pair: Pair, reference: FeatureReference | None) -> None:
        super().__init__()
        self.reward = reward
        self.prompt = reward.prompt_of(pair)
        self.reference = reference
        self._features = _Features(reward.reward.window)
        self._selection = StreamedSelection(reward.active.config.frames)

    def take(self, chunk: Chunk) -> Tensor:
        """Return the selected frames of the chunk; see `_Features.take`."""
        return self._features.take(self._selection.among(chunk.frames))

    def add(self, chunk: Chunk, seen: Tensor) -> None:
        """Keep the features of a chunk."""
        self._features.add(seen)

    def result(self) -> RewardResult:
        """Pool the features."""
        rows = self._features.joined()
        if rows is None:
            return RewardResult(fault=self._features.too_few())
        kept = self.reward.of_prompt(self.prompt) if self.reference is None else self.reference.kept
        return self.reward.pool(self._selection.of_all(rows), kept)


class StreamedSelection:
    """A selection of frames (`rewards/frame_selection.py`) among all frames of a video whose length is not yet known.

    No first frame is left out: `first` is frame 0, and `every:N` are the frames 0, N, …. `random:N` selects N evenly
    spaced frames, so that results are comparable. `last` and `random:N` are selected after the last frame, from the
    features of all frames.
    """

    def __init__(self, selection: str) -> None:
        self._kind, _, number = selection.partition(":")
        self._number = int(number or 1)
        self._seen = 0

    def among(self, frames: Tensor) -> Tensor:
        """Return those of the next frames that can be selected."""
        start, self._seen = self._seen, self._seen + len(frames)
        if self._kind == "first":
            return frames[: 1 if start == 0 else 0]
        if self._kind == "every":
            return frames[-start % self._number :: self._number]
        return frames

    def of_all(self, rows: Tensor) -> Tensor:
        """Return the selected rows of all rows."""
        if self._kind == "last":
            return rows[-1:]
        if self._kind == "random":
            count = min(self._number, len(rows))
            return rows[evenly_spaced(count, len(rows))]
        return rows
