"""Settings of rewards with vision networks, which are read without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from frostline.config import Precision
from frostline.errors import ConfigError
from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import Need
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.models.vision.clip import Clip
    from frostline.rewards.reward import Reward

CLIP_FOLDER = "config.json, model.safetensors, preprocessor_config.json, vocab.json and merges.txt"


def image_text_uses(name: str) -> tuple[Use, ...]:
    """Return the uses of a reward's two towers: prompts for the references, generated frames with a gradient."""
    return (
        Use(f"{name}_text", live=False, count=1, phase="conditioning"),
        Use(f"{name}_image", live=True, count=1, phase="reward"),
    )


class VisionConfig(RewardConfig):
    """Settings of all rewards with vision networks.

    Attributes:
        published: what to download for `weights`, and which of its files.
        license: SPDX identifier of the weights' licence; None if unknown.
    """

    stage_code: ClassVar[tuple[str, ...]] = ("frostline.rewards.vision.stages",)
    needs: ClassVar[frozenset[Need]] = frozenset()
    published: ClassVar[str]
    license: ClassVar[str | None] = None

    weights: Path | None = Field(default=None, description="path of the weights; they are not downloaded")
    precision: Precision = Field(
        default="fp32",
        description="floating-point type of the weights: fp32, fp16 or bf16; fp16 and bf16 need half the memory",
    )

    def existing(self, field: str, what: str) -> Path:
        """Return the path in a field.

        Args:
            what: what to download if the path is missing.
        Raises:
            ConfigError: the field is not set, or the path does not exist.
        """
        path: Path | None = getattr(self, field)
        advice = f"download {what}, and set {field} of the reward {self.type} to its path"
        if path is None:
            raise ConfigError(f"the reward {self.type} needs {field}: {advice}")
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder; {advice}")
        return path


class ImageTextConfig(VisionConfig):
    """Settings of rewards that compare frames with the prompt."""

    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    processor: Path | None = Field(
        default=None,
        description="folder with the tokenizer (vocab.json, merges.txt) and preprocessor_config.json, if "
        "they are not in the folder of the weights",
    )

    def build(self) -> Reward:
        """Load both towers.

        Raises:
            ConfigError: a file is missing or belongs to another model.
        """
        from frostline.rewards.vision.image_text import ImageTextReward

        return ImageTextReward(self, self.load())

    def load(self) -> Clip:
        """Load the weights, by default a folder of `transformers.CLIPModel`."""
        from frostline.models.vision.clip import load_clip

        weights = self.existing("weights", self.published)
        return load_clip(weights, self.existing("processor", CLIP_FOLDER) if self.processor else None)
