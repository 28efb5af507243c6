"""A reward in a single file, also an example: generated videos as sharp as the reference, neither more nor less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from frostline.rewards.config import RewardConfig
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.reward import Reward, RewardScore

# Settings are read without importing torch: import it in functions, or in a separate file.
if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.active import RewardStages

_LUMA = (0.299, 0.587, 0.114)


class Config(RewardConfig):
    """Videos as sharp as the reference, `rewards: [{type: sharpness, weight: 0.05}]`: 0 is the best score."""

    floor: float = Field(
        default=1e-6,
        gt=0,
        description="constant that is added to both mean squared Laplacians (luminance in [0, 1]), so that flat frames "
        "have a finite score",
    )

    def build(self) -> Reward:
        """Create the reward."""
        return SharpnessReward(self)


class SharpnessReward(FrameReward):
    """`-log(s / s_ref)^2`, where s is the mean squared Laplacian of the luminance.

    0 is the best score: as sharp as the reference. Further sharpening lowers the score.
    """

    Config = Config
    name = "sharpness"

    def __init__(self, config: Config) -> None:
        self.floor = config.floor

    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Return the mean squared Laplacian (B, T, 1) of each frame."""
        import torch
        import torch.nn.functional as F

        luma = (frames.float() * frames.new_tensor(_LUMA, dtype=torch.float32)[:, None, None]).sum(dim=2)
        kernel = luma.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
        edges = F.conv2d(luma.flatten(0, 1)[:, None], kernel)
        return edges.square().flatten(1).mean(dim=1).unflatten(0, frames.shape[:2])[..., None]

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> dict[str, Tensor]:
        """Return the sharpness (B,) of the reference."""
        assert features is not None
        return {"sharpness": self._pooled(features)}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Return the scores; all videos can be scored."""
        import torch

        ratio = self._pooled(features) / references["sharpness"]
        valid = torch.ones_like(ratio, dtype=torch.bool)
        return RewardScore(-ratio.log().square(), valid, {"sharpness_ratio": ratio.detach()})

    def _pooled(self, features: Tensor) -> Tensor:
        """Return (B,) means plus `floor`."""
        return features[..., 0].mean(dim=1) + self.floor
