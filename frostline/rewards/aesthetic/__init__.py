"""The aesthetic reward: predicted human rating of the frames. This module contains only its settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from frostline.rewards.vision.settings import CLIP_FOLDER, VisionConfig
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward


class Config(VisionConfig):
    """Rating of the generated frames from 1 to 10 by LAION's aesthetic predictor on CLIP; the score is the mean."""

    uses: ClassVar[tuple[Use, ...]] = (Use("aesthetic_image", live=True, count=1, phase="reward"),)
    published: ClassVar[str] = f"openai/clip-vit-large-patch14 from Hugging Face ({CLIP_FOLDER})"

    predictor: Path | None = Field(
        default=None,
        description="file of the predictor, sac+logos+ava1-l14-linearMSE.pth or the same weights as .safetensors",
    )

    def build(self) -> Reward:
        """Load CLIP's image tower and the predictor.

        Raises:
            ConfigError: a file is missing or belongs to another model.
        """
        from frostline.rewards.aesthetic.reward import AestheticReward

        return AestheticReward(self)
