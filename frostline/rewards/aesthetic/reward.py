"""CLIP's image tower as a stage, and the small predictor on its embeddings, which always runs in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frostline.models.vision.aesthetic import load_predictor
from frostline.models.vision.clip import ImageTower
from frostline.models.vision.folders import load_pretrained
from frostline.models.vision.preparation import PREPARATION_FILE, Preparation
from frostline.rewards.aesthetic import Config as AestheticConfig
from frostline.rewards.reward import RewardScore
from frostline.rewards.vision.reward import VisionReward

_PREDICTOR = "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"


class AestheticReward(VisionReward):
    """The mean rating of the frames."""

    Config = AestheticConfig
    description = "Encode preprocessed images (images, 3, side, side) as unit vectors, the input of the predictor."

    def __init__(self, config: AestheticConfig) -> None:
        from transformers import CLIPModel

        folder = config.existing("weights", config.published)
        file = config.existing("predictor", _PREDICTOR)
        tower = ImageTower(load_pretrained(CLIPModel, folder))
        super().__init__(config, tower, Preparation.read(folder), [folder / PREPARATION_FILE])
        self.predictor = load_predictor(file, tower.dim)

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Return the scores; all videos can be scored."""
        frames = self.predictor(features)[..., 0]
        score = frames.mean(dim=1)
        return RewardScore(score, torch.ones_like(score, dtype=torch.bool), frame_scores=frames.detach())
