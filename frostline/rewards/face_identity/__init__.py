"""The face-identity reward: similarity of the faces in a generated video to those of the reference.

This module contains only its settings, which are read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from frostline.rewards.config import RewardConfig
from frostline.rewards.face_identity.options import FaceOptions
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward


class Config(FaceOptions, RewardConfig):
    """Similarity of the face in each generated frame to the face in the reference; the score is a mean cosine."""

    # The detector runs on the reference and the generated frames; references are embedded without a gradient.
    uses: ClassVar[tuple[Use, ...]] = (
        Use("face_detector", live=False, count=1, phase="conditioning"),
        Use("face_embedder", live=False, count=1, phase="conditioning"),
        Use("face_detector", live=False, count=1, phase="reward"),
        Use("face_embedder", live=True, count=1, phase="reward"),
    )
    stage_code: ClassVar[tuple[str, ...]] = (f"{__name__}.stages",)

    baseline: float = Field(default=0.54, description="score at which the reward is zero")
    scale: float = Field(default=0.16, gt=0, description="standard deviation used to normalise the score")

    @property
    def label(self) -> str:
        """Return `face_sface`, `face_facenet`, …, depending on the embedder."""
        return f"face_{self.embedder.partition(':')[0]}"

    def build(self) -> Reward:
        """Load detector and embedder.

        Raises:
            ConfigError: there is no such network, or its weights are missing.
        """
        from frostline.rewards.face_identity.reward import FaceIdentityReward

        return FaceIdentityReward(self)
