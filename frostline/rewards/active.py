"""A reward in use: its settings, its stages, and the cache key of its references."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frostline.errors import ConfigError
from frostline.rewards.frame_selection import select_frames
from frostline.runtime.backends import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.config import RewardConfig
    from frostline.rewards.inputs import RewardInputs
    from frostline.rewards.reward import Reward, RewardScore
    from frostline.runtime.runtime import Runtime
    from frostline.runtime.stage import Runner, Stage

# A code example in a docstring; `ActiveReward.about` leaves it out.
_CODE = re.compile(r",? *`[^`]*`")


JUDGE = "judge_"
"""Prefix of the names of a judge's scores."""


@dataclass(frozen=True)
class RewardStages:
    """The stages of one reward, run by a runtime. A reward cannot run other stages: they are not in its cache keys."""

    runtime: Runtime
    names: Collection[str]

    def __getitem__(self, stage: str) -> Runner:
        if stage not in self.names:
            brought = ", ".join(self.names) or "none"
            raise ConfigError(f"a reward can only run its own stages: it requested {stage!r}, but has {brought}")
        return self.runtime[stage]

    def live(self, stage: str) -> AbstractContextManager[None]:
        """Time the PyTorch computation of the stage with a gradient within the block, as `<stage>_live`."""
        return self.runtime.clock.measure(f"{stage}_live", TORCH)


def check_scores(name: str, scored: RewardScore, count: int) -> None:
    """Check that scores contain one number for each of `count` videos.

    Args:
        name: name of the reward in the error.
    Raises:
        ConfigError: score, validity or a metric has another shape.
    """
    videos = f"{count} videos" if count != 1 else "one video"
    for what, values in {"score": scored.score, "valid": scored.valid, **scored.metrics}.items():
        if values.shape != (count,):
            raise ConfigError(
                f"the reward {name} returns {what} of shape {tuple(values.shape)} for {videos}, not ({count},)"
            )


def label_of(reward: Reward, config: RewardConfig) -> str:
    """Return the label of a reward: that of its settings or, for a user's class, the name of the reward."""
    return reward.name if ":" in config.type else config.label


@dataclass(frozen=True, eq=False)
class ActiveReward:
    """A reward with its settings and its stages.

    Attributes:
        references_key: hash of what its references depend on. The sample, and the weights and backends of its stages
            are not part of it; they are hashed separately.
    """

    reward: Reward
    config: RewardConfig
    stages: tuple[Stage, ...]
    references_key: str

    @property
    def name(self) -> str:
        """Return the name of its score in logs."""
        return self.reward.name

    @property
    def label(self) -> str:
        """Return the label of its score, which distinguishes several rewards of one type: from its settings or its
        class.
        """
        return label_of(self.reward, self.config)

    @property
    def about(self) -> str:
        """Return a sentence about what it scores, from the docstring of its settings."""
        return _CODE.sub("", " ".join((type(self.config).__doc__ or "").partition("\n\n")[0].split()))

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Return the names of its stages."""
        return tuple(stage.name for stage in self.stages)

    def references(self, sample: RewardInputs, runtime: Runtime) -> Mapping[str, Tensor]:
        """Compute the data that the reward stores for the references of `sample`, tensors of B rows."""
        return self.reward.references(sample, RewardStages(runtime, self.stage_names))

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], runtime: Runtime
    ) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1]; differentiable with respect to the frames.

        Raises:
            ConfigError: the reward does not return one number for each video.
        """
        chosen = select_frames(frames, self.config.frames)
        scored = self.reward.score(chosen, sample, references, RewardStages(runtime, self.stage_names))
        check_scores(self.name, scored, len(frames))
        by_frame = scored.frame_scores
        if by_frame is not None and (by_frame.ndim != 2 or len(by_frame) != len(frames)):
            raise ConfigError(
                f"the reward {self.name} returns frame_scores of shape {tuple(by_frame.shape)} for "
                f"{len(frames)} videos, not ({len(frames)}, T)"
            )
        return scored
