"""The interface of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from frostline.stages.provider import StageProvider

# A reward may be one file that includes its settings, which must be read without importing torch.
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
    """The result of a reward for B generated videos.

    Attributes:
        score: (B,) with graph; 0 with zero gradient if `valid` is False.
        valid: (B,) bool, whether the video could be scored.
        metrics: further values for each video, (B,) without graph, by name.
        frame_scores: (B, T) without graph, for each scored frame, NaN if it could not be scored; None if the reward
            does not score single frames. Validation uses them to pair the frames of two generated videos.
    """

    score: Tensor
    valid: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    frame_scores: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LiveNetwork:
    """A network that a reward computes with a gradient, for the memory plan.

    Attributes:
        stage: its name; the name of its stage if it has one.
        inputs: inputs of one use; the gradient is computed for the first.
        uses: number of uses in a training step.
    """

    stage: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    uses: int


class Reward(StageProvider, Protocol):
    """Scores generated videos. Subclasses are created from their `Config` only.

    Networks are attributes (`nn.Module`): they are moved to the device and frozen before `stages` is called. A reward
    does not store a runtime: `run` provides its own stages, each on the planned backend.

    Attributes:
        Config: the class of its settings.
        name: name of its score in logs.
        unscored: description of samples that it cannot score, for messages.
        reference_files: small files, such as a tokenizer's, whose content affects its references, besides code,
            settings and weights.
    """

    Config: type[RewardConfig]
    name: str
    unscored: str = "nothing to score"
    reference_files: Sequence[Path] = ()

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages of the reward; their names must be those of `Config.stage_names`."""
        return ()

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        """Return what `score` computes with a gradient in a step of this shape, for the memory plan."""
        return ()

    def references(self, sample: RewardInputs, run: RewardStages) -> Mapping[str, Tensor]:
        """Return data of the reference: tensors of B rows, without a gradient, cached for each sample.

        Videos have no padding: T may be smaller than for the generated videos.
        """
        return {}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1]; differentiable with respect to them."""
        ...
