"""What every kind of reward does with the frames of videos and references as they come in."""

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
    """What one reward says of one video.

    columns: fields of `VideoScore`. scores: its score and metrics by column, without those that have no value.
    note: what else there is to know. fault: why there is no score, where that is no judgement on the video.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    fault: str = ""


class Track:
    """One video or reference on its way through one reward.

    fault: why it has come to nothing; what follows of it is not looked at.
    """

    def __init__(self) -> None:
        self.fault = ""

    def take(self, chunk: Chunk) -> Tensor:
        """Return what the reward is to look at now that `chunk` is there: (n, 3, H, W) uint8, n may be 0."""
        return chunk.frames

    def add(self, chunk: Chunk, seen: Any) -> None:
        """Keep what the reward saw in what was taken."""


class ReferenceTrack(Track):
    """A reference, kept as what a reward needs of it. note: what there is to know of it."""

    note = ""

    def finish(self) -> None:
        """All frames were added; may set `fault`."""


class VideoTrack(Track, ABC):
    """A video that is scored."""

    @abstractmethod
    def result(self) -> RewardResult:
        """All frames were added, and neither the video nor its reference has a fault."""


class ScoredReward(ABC):
    """A reward that videos are scored by, with the runtime of its stages.

    Attributes:
        label: the column of its score.
        active: the reward and its settings.
        runtime: serves its stages alone.
        device: where its networks are.
        batch: frames that it looks at in one call.
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
        """Whether the references of videos are decoded for it."""
        return bool(self.active.config.needs & COMPARES)

    @property
    def references_depend_on_prompts(self) -> bool:
        """Whether what is kept of a reference is of one prompt alone."""
        return self.needs_reference and "prompt" in self.active.config.needs

    @property
    def of_the_user(self) -> bool:
        """Whether it is no reward of frostline: what goes wrong in it is a matter of the video that it looked at."""
        return ":" in self.active.config.type

    def prompt_of(self, pair: Pair) -> str:
        """The prompt of a video as far as it matters."""
        return pair.prompt if "prompt" in self.active.config.needs else ""

    def provenance(self) -> Mapping[str, str]:
        """Fields of `VideoScore` that say what computes it."""
        return {}

    def backends(self) -> Mapping[str, str]:
        """What serves each stage now, by stage."""
        return {name: choice.backend for name, choice in self.runtime.plan.items()}

    @abstractmethod
    def reference(self, pair: Pair) -> ReferenceTrack:
        """Begin the reference of a video."""

    @abstractmethod
    def video(self, pair: Pair, reference: ReferenceTrack | None) -> VideoTrack:
        """Begin a video whose reference is finished, or without one where it needs none."""

    @abstractmethod
    def observe(self, parts: Sequence[Tensor]) -> Sequence[Any]:
        """Look at what tracks took, uint8 frames of one size, in batches across them; one result for each part."""

    def result_of(self, scored: RewardScore) -> RewardResult:
        """Turn the `RewardScore` of one video into columns.

        Raises:
            ConfigError: it is not that of one video.
        """
        label, score = self.label, scored.score
        check_scores(label, scored, count=1)
        metrics = {metric_column(label, name): values.item() for name, values in scored.metrics.items()}
        scores = {name: round(value, _DIGITS) for name, value in metrics.items() if math.isfinite(value)}
        if not scored.valid:
            return RewardResult(scores=scores, note=self.active.reward.unscored)
        if not score.isfinite():
            return RewardResult(scores=scores, fault=f"its score is {score.item()}")
        return RewardResult(scores={label: round(score.item(), _DIGITS), **scores})


def metric_column(label: str, name: str) -> str:
    """The column of a metric: it begins with that of the score."""
    return name if name.startswith(f"{label}_") else f"{label}_{name}"
