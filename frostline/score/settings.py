"""What a score depends on, beside the frames."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from frostline.config import Settings


class ScoreSettings(Settings):
    """How videos are scored; the names and defaults are the face-identity reward's where both have them."""

    detector: str = Field(default="mtcnn", description="face detector: mtcnn, yunet or scrfd:PATH.onnx")
    embedder: str = Field(
        default="sface", description="face embedder: sface, facenet[:TAG or PATH] or arcface:PATH.onnx"
    )
    upscale: int = Field(default=1, ge=1, le=8, description="enlarge frames this many times before detection")
    min_face_size: int = Field(
        default=20, ge=12, description="smallest face that mtcnn looks for, in (enlarged) pixels"
    )
    face: Literal["largest", "best"] = Field(
        default="largest",
        description="which of several faces in a frame counts: the largest, or the best likeness of the reference",
    )
    missing_face: Literal["exclude", "zero"] = Field(
        default="exclude", description="frames without a face: left out of the mean, or counted as 0"
    )
    every: int = Field(default=1, ge=1, description="score every Nth frame")
    max_frames: int | None = Field(default=None, ge=1, description="score at most this many frames of a video")

    def __str__(self) -> str:
        """As results carry it, so that nobody mixes results of different settings."""
        return " ".join(f"{name}={'all' if value is None else value}" for name, value in self)
