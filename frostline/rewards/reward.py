"""What a reward is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from frostline.stages.provider import StageProvider

# A reward may be one file with its settings, which must be read without torch.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from frostline.models.video_shape import VideoShape
    from frostline.rewards.active import RewardStages
    from frostline.rewards.config import RewardConfig
    from frostline.rewards.inputs import RewardInputs
    from frostline.runtime.stage import Stage
    from frostline.stages.shapes import ShapeRange


@dataclass(frozen=True, eq=False)
class RewardScore:
    """What a reward says of B generated videos.

    score: (B,) with graph; 0 with zero gradient where `valid` is False. valid: (B,) bool, whether there was anything
    to score. metrics: further figures of each video, (B,) without graph, by name.
    frame_scores: (B, T) without graph, of each frame that was looked at, NaN where it could not be scored; None of a
    reward that says nothing of single frames. By them validation pairs the frames of two generated videos.
    """

    score: Tensor
    valid: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    frame_scores: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LiveNetwork:
    """A network that a reward computes with gradient, for the memory plan.

    stage: its name, that of its stage where it has one. inputs: of one use, whose gradient is that of the first.
    uses: how many of these a training step makes.
    """

    stage: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    uses: int


class Reward(StageProvider, Protocol):
    """Scores generated videos. A reward inherits from this class and is made of its `Config` alone.

    Networks are attributes (`nn.Module`): they are moved to the device and frozen before `stages` is called. A reward
    keeps no runtime: `run` hands out its own stages, each on the backend that the plan names.

    Attributes:
        Config: the settings that it is made of.
        name: what logs call its score.
        unscored: what is said of samples that it cannot score.
        reference_files: small files, such as a tokenizer's, that its references depend on beside code, settings and
            weights; their content counts.
    """

    Config: type[RewardConfig]
    name: str
    unscored: str = "nothing to score"
    reference_files: Sequence[Path] = ()

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages that the reward brings; their names are those in `Config.uses`."""
        return ()

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        """Return what `score` computes with gradient in a step of this shape, for the memory plan."""
        return ()

    def references(self, sample: RewardInputs, run: RewardStages) -> Mapping[str, Tensor]:
        """Return what is to be known of the reference: tensors of B rows, without gradient, cached for each sample.

        Videos come without what pads them: T may be less than the generated videos have.
        """
        return {}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1], differentiable to them."""
        ...
