"""Options of face detection and comparison, shared by the reward and by scoring."""

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
        description="channel order of the input of an arcface embedder: rgb, which its files are trained with, or bgr; "
        "scores differ, so choose baseline and scale for the order",
    )
    upscale: int = Field(default=1, ge=1, le=8, description="factor by which frames are enlarged before detection")
    detection_size: int | None = Field(
        default=None,
        ge=32,
        le=4096,
        description="longest side in pixels to which frames are resized before detection; smaller frames are enlarged; "
        "replaces upscale",
    )
    min_face_size: int = Field(
        default=20, ge=12, description="smallest face that mtcnn detects, in pixels of the resized frame"
    )
    face: Literal["largest", "best"] = Field(
        default="largest",
        description="which of several faces in a frame is scored: the largest, or the one most similar to the "
        "reference (best); in the reference, always the largest",
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
            ValueError: they cannot be combined.
        """
        if self.detection_size is not None and self.upscale > 1:
            raise ValueError("upscale and detection_size both set the size of frames for detection: set one of them")
        if self.channels != "rgb" and not self.embedder.startswith("arcface:"):
            raise ValueError(f"channels: {self.embedder} has a fixed channel order: bgr needs arcface:PATH.onnx")
        return self
