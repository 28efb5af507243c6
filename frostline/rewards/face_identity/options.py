"""How faces are found and compared: the settings that the reward and scoring share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from frostline.config import Settings


class FaceOptions(Settings):
    """Options of face detection and embedding."""

    detector: str = Field(default="mtcnn", description="face detector: mtcnn, yunet or scrfd:PATH.onnx")
    embedder: str = Field(
        default="sface", description="face embedder: sface, dlib[:PATH.dat], facenet[:TAG or PATH] or arcface:PATH.onnx"
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
        description="which of several faces in a frame counts: the largest, or the best likeness of the reference; in "
        "the reference itself, it is always the largest",
    )
    missing_face: Literal["exclude", "zero"] = Field(
        default="exclude", description="frames without a face: left out of the mean, or counted as 0"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        return self.check_together()

    def check_together(self) -> Self:
        """Return these options, if they can be combined.

        Raises:
            ValueError: they cannot.
        """
        if self.detection_size is not None and self.upscale > 1:
            raise ValueError("upscale and detection_size both set the size of frames for detection: set one of them")
        if self.channels != "rgb" and not self.embedder.startswith("arcface:"):
            raise ValueError(f"channels: {self.embedder} has a fixed order: bgr applies to arcface:PATH.onnx only")
        return self
