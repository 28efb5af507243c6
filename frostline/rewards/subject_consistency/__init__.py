"""The subject-consistency reward: similarity of the subject in all frames. This module contains only its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from frostline.rewards.inputs import Need
from frostline.rewards.vision.settings import VisionConfig
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward


class Config(VisionConfig):
    """Mean cosine of each generated frame to the first one (or the reference) and to the previous one, by DINOv2."""

    # The first use is for references only, if `anchor` requires them.
    uses: ClassVar[tuple[Use, ...]] = (
        Use("subject_consistency_image", live=False, count=1, phase="conditioning"),
        Use("subject_consistency_image", live=True, count=1, phase="reward"),
    )
    needs_neighbours: ClassVar[bool] = True
    published: ClassVar[str] = (
        "a DINOv2 model from Hugging Face, such as facebook/dinov2-base (config.json, model.safetensors and "
        "preprocessor_config.json)"
    )
    license: ClassVar[str | None] = "Apache-2.0"

    anchor: Literal["first_frame", "reference"] = Field(
        default="first_frame",
        description="what all frames are compared with: the first frame, or the mean of the reference's frames",
    )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """Return what it needs, depending on `anchor`."""
        return frozenset({"reference"}) if self.anchor == "reference" else frozenset()

    def step_uses(self) -> tuple[Use, ...]:
        """Return the uses of a step; references are only used if the anchor depends on them."""
        return self.uses if self.anchor == "reference" else self.uses[1:]

    def build(self) -> Reward:
        """Load DINOv2.

        Raises:
            ConfigError: a file is missing or belongs to another model.
        """
        from frostline.rewards.subject_consistency.reward import SubjectConsistencyReward

        return SubjectConsistencyReward(self)
