"""The face-identity reward: are the faces of a generated video those of the reference?

Here are its settings alone, which are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from frostline.rewards.config import RewardConfig
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward


class Config(RewardConfig):
    """The person of the reference video in every generated frame; the score is a mean cosine."""

    # The detector sees the reference and the generated frames; the references are embedded without gradient.
    uses: ClassVar[tuple[Use, ...]] = (
        Use("face_detector", live=False, count=1, phase="conditioning"),
        Use("face_embedder", live=False, count=1, phase="conditioning"),
        Use("face_detector", live=False, count=1, phase="reward"),
        Use("face_embedder", live=True, count=1, phase="reward"),
    )
    stage_code: ClassVar[tuple[str, ...]] = (f"{__name__}.stages",)

    baseline: float = Field(default=0.54, description="score at which the reward is zero")
    scale: float = Field(default=0.16, gt=0, description="spread of scores that counts as one unit")
    detector: str = Field(default="mtcnn", description="mtcnn, yunet or scrfd:PATH.onnx")
    embedder: str = Field(
        default="sface", description="sface, dlib[:PATH.dat], facenet[:TAG or PATH] or arcface:PATH.onnx"
    )
    channels: Literal["rgb", "bgr"] = Field(
        default="rgb",
        description="order in which pixels reach an arcface embedder: rgb, as its files are trained, or bgr; scores "
        "differ, so baseline and scale go with it",
    )
    upscale: int = Field(default=1, ge=1, le=8, description="enlarge frames this many times before detection")
    detection_size: int | None = Field(
        default=None,
        ge=32,
        le=4096,
        description="resize frames to this longest side before detection, enlarging too; in place of upscale",
    )
    min_face_size: int = Field(
        default=20, ge=12, description="smallest face that mtcnn looks for, in (enlarged) pixels"
    )
    face: Literal["largest", "best"] = Field(
        default="largest",
        description="which of several faces in a generated frame counts: the largest, or the best likeness of the "
        "reference; of a reference it is the largest",
    )
    missing_face: Literal["exclude", "zero"] = Field(
        default="exclude", description="frames without a face: left out of the mean, or counted as 0"
    )

    @model_validator(mode="after")
    def _one_size_of_detection(self) -> Self:
        if self.detection_size is not None and self.upscale > 1:
            raise ValueError("upscale and detection_size both say how large frames are searched: set one of them")
        return self

    @model_validator(mode="after")
    def _others_have_channels_of_their_own(self) -> Self:
        if self.channels != "rgb" and not self.embedder.startswith("arcface:"):
            raise ValueError(f"channels: {self.embedder} has an order of its own: bgr is for arcface:PATH.onnx alone")
        return self

    @property
    def label(self) -> str:
        """`face_sface`, `face_facenet`, …: by the kind of its embedder."""
        return f"face_{self.embedder.partition(':')[0]}"

    def build(self) -> Reward:
        """Load detector and embedder.

        Raises:
            ConfigError: there is no such network, or its weights cannot be had.
        """
        from frostline.rewards.face_identity.reward import FaceIdentityReward

        return FaceIdentityReward(self)
