"""The face stages with the interfaces of `models.faces`, on the planned backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.models.faces.detections import Detections, upscale_frames
from frostline.models.faces.embedders import FaceEmbedder
from frostline.stages.provider import Stages


@dataclass(frozen=True)
class ServedDetector:
    """The `face_detector` stage as a `FaceDetector`, on the planned backend."""

    run: Stages

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Detect faces in (N, 3, H, W) uint8 frames, enlarged `upscale` times; results are in pixels of the frames."""
        larger = upscale_frames(frames, upscale)
        found = self.run["face_detector"](frames=larger)
        height, width = larger.shape[-2:]
        return Detections(**found, num_frames=len(frames), frame_size=(height, width)).divided(upscale)


@dataclass
class ServedEmbedder:
    """The `face_embedder` stage as a frozen `FaceEmbedder`."""

    run: Stages
    name: str
    image_size: int
    embedding_dim: int
    template: Tensor

    @classmethod
    def of(cls, embedder: FaceEmbedder, run: Stages) -> ServedEmbedder:
        """Return the wrapper of the stage that was created from `embedder`."""
        return cls(run, embedder.name, embedder.image_size, embedder.embedding_dim, embedder.template)

    @torch.no_grad()
    def __call__(self, faces: Tensor) -> Tensor:
        """Map (N, 3, S, S) RGB faces in [-1, 1] to (N, D) unit-norm vectors; N may be 0."""
        if len(faces) == 0:
            return faces.new_zeros(0, self.embedding_dim)
        return self.run["face_embedder"](faces=faces)["embeddings"]
