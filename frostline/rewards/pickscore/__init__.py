"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): human choice for a prompt. This module contains only its
settings.
"""

from __future__ import annotations

from typing import ClassVar

from frostline.rewards.vision.settings import CLIP_FOLDER, ImageTextConfig, image_text_uses
from frostline.stages.provider import Use


class Config(ImageTextConfig):
    """PickScore of the generated frames for the prompt, a mean logit: +1 multiplies the odds by e."""

    uses: ClassVar[tuple[Use, ...]] = image_text_uses("pickscore")
    published: ClassVar[str] = f"yuvalkirstain/PickScore_v1 from Hugging Face ({CLIP_FOLDER})"
