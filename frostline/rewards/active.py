"""A reward at work: its settings, its stages, and what its references are cached by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frostline.errors import ConfigError
from frostline.runtime.backends import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.config import RewardConfig
    from frostline.rewards.inputs import RewardInputs
    from frostline.rewards.reward import Reward, RewardScore
    from frostline.runtime.runtime import Runtime
    from frostline.runtime.stage import Runner, Stage


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
        scored = self.reward.score(frames, sample, references, RewardStages(runtime, self.stage_names))
        given = {"score": scored.score, "valid": scored.valid, **scored.metrics}
        for name, values in given.items():
            if values.shape != (len(frames),):
                raise ConfigError(
                    f"the reward {self.name} gives {name} of shape {tuple(values.shape)} for {len(frames)} videos, "
                    f"not ({len(frames)},)"
                )
        return scored
