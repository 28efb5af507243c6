"""The CLIP reward: similarity of every frame to the prompt. This module contains only its settings."""

from __future__ import annotations

from typing import ClassVar

from frostline.rewards.vision.settings import CLIP_FOLDER, ImageTextConfig, image_text_uses
from frostline.stages.provider import Use


class Config(ImageTextConfig):
    """Similarity of the generated frames to the prompt by any CLIP model; the score is the mean logit."""

    uses: ClassVar[tuple[Use, ...]] = image_text_uses("clip")
    published: ClassVar[str] = f"a CLIP model from Hugging Face, such as openai/clip-vit-large-patch14 ({CLIP_FOLDER})"
