"""What a reward is told of samples beside the generated frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# Cached conditions depend on what this file imports.
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RewardInputs:
    """B samples.

    prompts: one each. video: the reference, (B, T, 3, H, W) in [0, 1]. valid_frames: how many frames of each video
    count; those behind are copies of its last one. Of a picture two do: rewards leave out the first, which is given.
    """

    prompts: tuple[str, ...]
    video: Tensor
    valid_frames: tuple[int, ...]

    def rows(self, indices: list[int]) -> RewardInputs:
        """Some of the samples."""
        prompts = tuple(self.prompts[index] for index in indices)
        return RewardInputs(prompts, self.video[indices], tuple(self.valid_frames[index] for index in indices))

    def row(self, index: int) -> RewardInputs:
        """One sample, its video without what pads it."""
        frames = self.valid_frames[index]
        return RewardInputs((self.prompts[index],), self.video[index, :frames][None], (frames,))
