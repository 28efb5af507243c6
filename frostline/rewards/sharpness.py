"""A second reward, and an example of one: generated videos as sharp as the reference, no more and no less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import ConfigError
from frostline.rewards.reward import RewardScore

_LUMA = (0.299, 0.587, 0.114)


class SharpnessReward:
    """`-log(s / s_ref)^2`, where s is the mean squared Laplacian of the luminance.

    0 is the best score: as sharp as the reference. Nothing is won by sharpening past it.

        reward: {type: "frostline.rewards.sharpness:SharpnessReward", baseline: 0, scale: 1, weight: 0.05}

    Args:
        floor: squared Laplacian (luminance in [0, 1]) below which a picture counts as flat.
    """

    name = "sharpness"

    def __init__(self, floor: float = 1e-6) -> None:
        if not floor > 0:
            raise ConfigError(f"floor of the sharpness reward must be above 0, not {floor}")
        self.floor = floor

    def references(self, video: Tensor) -> dict[str, Tensor]:
        """The sharpness (B,) of the frames that are generated: all but the first, which is given."""
        return {"sharpness": self._sharpness(video[:, 1:])}

    def score(self, frames: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """All videos can be scored."""
        sharpness = self._sharpness(frames[:, 1:])
        ratio = sharpness / references["sharpness"]
        valid = torch.ones_like(ratio, dtype=torch.bool)
        return RewardScore(-ratio.log().square(), valid, {"sharpness_ratio": ratio.detach()})

    def _sharpness(self, frames: Tensor) -> Tensor:
        """(B,) at least `floor`, of (B, T, 3, H, W) frames in [0, 1]."""
        luma = (frames.float() * frames.new_tensor(_LUMA, dtype=torch.float32)[:, None, None]).sum(dim=2)
        kernel = luma.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
        edges = F.conv2d(luma.flatten(0, 1)[:, None], kernel)
        return edges.square().flatten(1).mean(dim=1).unflatten(0, frames.shape[:2]).mean(dim=1) + self.floor
