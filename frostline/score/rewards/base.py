"""Define the interface between scoring and the kinds of rewards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frostline.rewards.active import ActiveReward, RewardStages, check_scores
from frostline.rewards.inputs import COMPARES
from frostline.rewards.reward import RewardScore
from frostline.runtime.runtime import Runtime
from frostline.score.decoding import Chunk
from frostline.score.request import Pair

_DIGITS = 7


@dataclass(frozen=True)
class RewardResult:
    """The result of one reward for one video.

    Attributes:
        columns: fields of `VideoScore`.
        scores: score and metrics by column; missing values are omitted.
        note: a remark, for example why the reward does not score this video.
        fault: the reason if the reward failed.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    fault: str = ""


class Track:
    """The state of one video or reference for one reward.

    Attributes:
        fault: the reason if it failed; all further frames are skipped.
    """

    def __init__(self) -> None:
        self.fault = ""

    def take(self, chunk: Chunk) -> Tensor:
        """Return the frames to observe after `chunk` was decoded: (n, 3, H, W) uint8, with n >= 0."""
        return chunk.frames

    def add(self, chunk: Chunk, seen: Any) -> None:
        """Add the observation of the frames that `take` returned for `chunk`."""


class ReferenceTrack(Track):
    """The state of a reference for one reward.

    Attributes:
        note: a remark on the reference.
    """

    note = ""

    def finish(self) -> None:
        """Finish the reference after its last frame; may set `fault`."""


class VideoTrack(Track, ABC):
    """The state of a video for one reward."""

    @abstractmethod
    def result(self) -> RewardResult:
        """Return the result after the last frame. Only called if neither the video nor its reference has a fault."""


class ScoredReward(ABC):
    """A reward with the runtime of its stages.

    Attributes:
        label: the column of the score.
        active: the reward and its settings.
        runtime: the runtime of the stages of this reward only.
        device: the device of the networks.
        batch: the number of frames per call of the networks.
    """

    def __init__(self, label: str, active: ActiveReward, runtime: Runtime, device: torch.device, batch: int) -> None:
        self.active = active
        self.runtime = runtime
        self.label = label
        self.device = device
        self.batch = batch
        self.run = RewardStages(runtime, active.stage_names)

    @property
    def needs_reference(self) -> bool:
        """Return whether the reward needs the decoded references of videos."""
        return bool(self.active.config.needs & COMPARES)

    @property
    def references_depend_on_prompts(self) -> bool:
        """Return whether the state of a reference depends on the prompt."""
        return self.needs_reference and "prompt" in self.active.config.needs

    @property
    def of_the_user(self) -> bool:
        """Return whether this is a custom reward. Its errors become error rows, and do not stop the run."""
        return ":" in self.active.config.type

    def prompt_of(self, pair: Pair) -> str:
        """Return the prompt of a video; an empty string if the reward does not use it."""
        return pair.prompt if "prompt" in self.active.config.needs else ""

    def provenance(self) -> Mapping[str, str]:
        """Return the fields of `VideoScore` with networks and backends of this reward."""
        return {}

    def backends(self) -> Mapping[str, str]:
        """Return the current backend of each stage, by stage name."""
        return {name: choice.backend for name, choice in self.runtime.plan.items()}

    @abstractmethod
    def reference(self, pair: Pair) -> ReferenceTrack:
        """Return the initial state of the reference of a video."""

    @abstractmethod
    def video(self, pair: Pair, reference: ReferenceTrack | None) -> VideoTrack:
        """Return the initial state of a video.

        Args:
            pair: the pair of the video.
            reference: the finished reference; None if the reward does not need one.
        """

    @abstractmethod
    def observe(self, parts: Sequence[Tensor]) -> Sequence[Any]:
        """Return one observation for each part. Batches can span several parts.

        Args:
            parts: the frames that `Track.take` returned, (n, 3, H, W) uint8, all of the same size.
        """

    def result_of(self, scored: RewardScore) -> RewardResult:
        """Convert the `RewardScore` of one video to columns.

        Raises:
            ConfigError: the score does not have a batch size of 1.
        """
        label, score = self.label, scored.score
        check_scores(label, scored, count=1)
        metrics = {metric_column(label, name): values.item() for name, values in scored.metrics.items()}
        scores = {name: round(value, _DIGITS) for name, value in metrics.items() if math.isfinite(value)}
        if not scored.valid:
            return RewardResult(scores=scores, note=self.active.reward.unscored)
        if not score.isfinite():
            return RewardResult(scores=scores, fault=f"the score is {score.item()}")
        return RewardResult(scores={label: round(score.item(), _DIGITS), **scores})


def metric_column(label: str, name: str) -> str:
    """Return the column of a metric, which begins with the label of its reward."""
    return name if name.startswith(f"{label}_") else f"{label}_{name}"
