"""A reward of one file, and an example of one: generated videos as sharp as the reference, no more and no less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from frostline.rewards.config import RewardConfig
from frostline.rewards.reward import Reward, RewardScore

# Settings are read without torch: what needs it imports it where it is called, or lies in a file of its own.
if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.active import RewardStages
    from frostline.rewards.inputs import RewardInputs

_LUMA = (0.299, 0.587, 0.114)


class Config(RewardConfig):
    """Videos as sharp as the reference, `rewards: [{type: sharpness, weight: 0.05}]`: 0 is the best score."""

    floor: float = Field(
        default=1e-6, gt=0, description="squared Laplacian (luminance in [0, 1]) below which a picture counts as flat"
    )

    def build(self) -> Reward:
        """Make the reward."""
        return SharpnessReward(self)


class SharpnessReward(Reward):
    """`-log(s / s_ref)^2`, where s is the mean squared Laplacian of the luminance.

    0 is the best score: as sharp as the reference. Nothing is won by sharpening past it.
    """

    Config = Config
    name = "sharpness"

    def __init__(self, config: Config) -> None:
        self.floor = config.floor

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        """The sharpness (B,) of the frames that are generated: all but the first, which is given."""
        return {"sharpness": self._sharpness(sample.video[:, 1:])}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """All videos can be scored."""
        import torch

        sharpness = self._sharpness(frames[:, 1:])
        ratio = sharpness / references["sharpness"]
        valid = torch.ones_like(ratio, dtype=torch.bool)
        return RewardScore(-ratio.log().square(), valid, {"sharpness_ratio": ratio.detach()})

    def _sharpness(self, frames: Tensor) -> Tensor:
        """(B,) at least `floor`, of (B, T, 3, H, W) frames in [0, 1]."""
        import torch
        import torch.nn.functional as F

        luma = (frames.float() * frames.new_tensor(_LUMA, dtype=torch.float32)[:, None, None]).sum(dim=2)
        kernel = luma.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
        edges = F.conv2d(luma.flatten(0, 1)[:, None], kernel)
        return edges.square().flatten(1).mean(dim=1).unflatten(0, frames.shape[:2]).mean(dim=1) + self.floor
