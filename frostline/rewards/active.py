"""A reward at work: its settings, its stages, and what its references are cached by."""

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

# An example of settings, within a sentence.
_CODE = re.compile(r",? *`[^`]*`")


JUDGE = "judge_"
"""What the names of a judge's scores begin with."""


@dataclass(frozen=True)
class RewardStages:
    """The stages of one reward, served by a runtime; those of others are no business of it, nor of what it caches."""

    runtime: Runtime
    names: Collection[str]

    def __getitem__(self, stage: str) -> Runner:
        if stage not in self.names:
            brought = ", ".join(self.names) or "none"
            raise ConfigError(f"a reward runs its own stages alone: it asks for {stage!r}, and brings {brought}")
        return self.runtime[stage]

    def live(self, stage: str) -> AbstractContextManager[None]:
        """Time what PyTorch computes of the stage with gradient within the block, as `<stage>_live`."""
        return self.runtime.clock.measure(f"{stage}_live", TORCH)


def check_scores(name: str, scored: RewardScore, count: int) -> None:
    """Refuse what is not one number for each of `count` videos.

    Args:
        name: what the error calls the reward.
    Raises:
        ConfigError: score, validity or a metric has another shape.
    """
    videos = f"{count} videos" if count != 1 else "one video"
    for what, values in {"score": scored.score, "valid": scored.valid, **scored.metrics}.items():
        if values.shape != (count,):
            raise ConfigError(
                f"the reward {name} gives {what} of shape {tuple(values.shape)} for {videos}, not ({count},)"
            )


def label_of(reward: Reward, config: RewardConfig) -> str:
    """Return the label that the settings give a reward; of a class of the user's, its name."""
    return reward.name if ":" in config.type else config.label


@dataclass(frozen=True, eq=False)
class ActiveReward:
    """A reward with its settings and the stages that it brings.

    references_key: what its references depend on beside the sample and the weights and backends of its stages.
    """

    reward: Reward
    config: RewardConfig
    stages: tuple[Stage, ...]
    references_key: str

    @property
    def name(self) -> str:
        """What logs call its score."""
        return self.reward.name

    @property
    def label(self) -> str:
        """What its score is called where several rewards of one type may be: that of its settings, or of its class."""
        return label_of(self.reward, self.config)

    @property
    def about(self) -> str:
        """What it scores, in a sentence: what its settings say of themselves."""
        return _CODE.sub("", " ".join((type(self.config).__doc__ or "").partition("\n\n")[0].split()))

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Those of its stages."""
        return tuple(stage.name for stage in self.stages)

    def references(self, sample: RewardInputs, runtime: Runtime) -> Mapping[str, Tensor]:
        """What the reward is to know of the reference videos."""
        return self.reward.references(sample, RewardStages(runtime, self.stage_names))

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], runtime: Runtime
    ) -> RewardScore:
        """What the reward says of generated (B, T, 3, H, W) frames in [0, 1], differentiable to them.

        Raises:
            ConfigError: it says something else than a number of each video.
        """
        chosen = select_frames(frames, self.config.frames)
        scored = self.reward.score(chosen, sample, references, RewardStages(runtime, self.stage_names))
        check_scores(self.name, scored, len(frames))
        by_frame = scored.frame_scores
        if by_frame is not None and (by_frame.ndim != 2 or len(by_frame) != len(frames)):
            raise ConfigError(
                f"the reward {self.name} gives frame_scores of shape {tuple(by_frame.shape)} for {len(frames)} videos, "
                f"not ({len(frames)}, T)"
            )
        return scored
