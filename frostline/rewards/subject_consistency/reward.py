"""Cosine similarities between frames, as in VBench's subject consistency (Huang et al. 2024, arXiv:2311.17982)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.models.vision.dinov2 import load_dinov2
from frostline.models.vision.preparation import PREPARATION_FILE
from frostline.rewards.active import RewardStages
from frostline.rewards.reward import RewardScore
from frostline.rewards.subject_consistency import Config as SubjectConsistencyConfig
from frostline.rewards.vision.reward import VisionReward


class SubjectConsistencyReward(VisionReward):
    """The mean over frames t >= 1 of `(max(0, cos(a, d_t)) + max(0, cos(d_{t-1}, d_t))) / 2`.

    d_t is DINOv2's vector of frame t; the anchor a is d_0, or the mean of d over the reference. Frame 0 is the given
    first frame of the generated video.
    """

    Config = SubjectConsistencyConfig
    uses_start = True
    unscored = "a single frame"
    description = (
        "Encode preprocessed images (images, 3, side, side) as unit vectors, which are similar for the same subject."
    )

    def __init__(self, config: SubjectConsistencyConfig) -> None:
        folder = config.existing("weights", config.published)
        network, prepare = load_dinov2(folder)
        super().__init__(config, network, prepare, [folder / PREPARATION_FILE])

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> dict[str, Tensor]:
        """Return the anchor (B, D), of unit norm, if it depends on the reference."""
        return {} if features is None else {"anchor": F.normalize(features.mean(dim=1), dim=1)}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Return the scores; a video with one frame cannot be scored."""
        before, after = features[:, :-1], features[:, 1:]
        anchor = references["anchor"][:, None] if self.needs_reference else features[:, :1]
        cosines = torch.stack([(other * after).sum(dim=2) for other in (anchor, before)]).clamp(min=0)
        valid = torch.full((len(features),), after.shape[1] > 0, device=features.device)
        frames = cosines.mean(dim=0)
        score = frames.mean(dim=1) if after.shape[1] > 0 else 0 * features.sum(dim=(1, 2))
        return RewardScore(score, valid, frame_scores=frames.detach())
