"""HPS v2 (Wu et al. 2023, arXiv:2306.09341): human preference for a prompt. This module contains only its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from frostline.rewards.vision.settings import ImageTextConfig, image_text_uses
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.models.vision.clip import Clip


class Config(ImageTextConfig):
    """Human Preference Score v2 of the generated frames for the prompt: a mean cosine, mostly 0.2 to 0.35."""

    uses: ClassVar[tuple[Use, ...]] = image_text_uses("hpsv2")
    published: ClassVar[str] = "HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of xswu/HPSv2 from Hugging Face"
    license: ClassVar[str | None] = "Apache-2.0"

    # The model's preferences are softmax(100 cosine).
    scale: float = Field(
        default=0.01,
        gt=0,
        description="standard deviation used to normalise the score; 0.01 corresponds to 1 of the model's logits",
    )

    def load(self) -> Clip:
        """Load the file, and the tokenizer from its folder or from `processor`."""
        from frostline.models.vision.hpsv2 import load_hpsv2

        weights = self.existing("weights", self.published)
        tokenizer = "vocab.json and merges.txt of a CLIP model, such as openai/clip-vit-large-patch14"
        return load_hpsv2(weights, self.existing("processor", tokenizer) if self.processor else weights.parent)
