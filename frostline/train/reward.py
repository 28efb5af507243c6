"""The face-identity reward of a training step: detection frozen, embedding live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from frostline.config import RewardSettings
from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FaceIdentity, IdentityScore, ReferenceFaces, identity_score
from frostline.runtime.cache import content_key
from frostline.runtime.faces import RuntimeDetector, RuntimeEmbedder
from frostline.runtime.runtime import Runtime


class FaceIdentityReward:
    """Scores generated frames against the faces of the reference video.

    Args:
        embedder: differentiable; the frozen use for references goes through the runtime.
    """

    def __init__(self, settings: RewardSettings, runtime: Runtime, embedder: nn.Module) -> None:
        self.settings = settings
        self.runtime = runtime
        self.embedder = embedder
        live = cast(FaceEmbedder, embedder)
        self.identity = FaceIdentity(RuntimeDetector(runtime), live, settings.upscale, settings.missing_face)
        self.identity.reference_embedder = RuntimeEmbedder.of(live, runtime)

    @property
    def references_key(self) -> str:
        """What the references depend on, beside the video and the weights."""
        return content_key(upscale=self.settings.upscale, min_face_size=self.settings.min_face_size)

    def references(self, video: Tensor) -> ReferenceFaces:
        """The faces in frames 1…T-1 of (B, T, 3, H, W) reference videos in [0, 1]."""
        return self.identity.references(video)

    def score(self, frames: Tensor, references: ReferenceFaces) -> IdentityScore:
        """The score of generated (B, T, 3, H, W) frames in [0, 1], differentiable to the frames."""
        faces = self.identity.detect(frames)
        with self.runtime.clock.measure("face_embedder_live", "torch"):
            embeddings = self.identity.embed(frames, faces)
        return identity_score(
            embeddings, faces.found, references.embeddings, references.found, self.settings.missing_face
        )


@dataclass(frozen=True)
class RewardLoss:
    """loss, face_score: 0-dim with graph."""

    loss: Tensor
    face_score: Tensor


def reward_loss(score: IdentityScore, settings: RewardSettings) -> RewardLoss:
    """`-(face_score - baseline) / scale * weight`, the mean over the samples that count.

    Samples without any face count as 0 or not at all, as `on_no_face` says; their gradient is zero either way.
    Without a sample that counts there is no reward: a loss of 0 that still hangs on the graph.
    """
    counts = torch.ones_like(score.valid) if settings.on_no_face == "zero" else score.valid
    number = counts.sum().clamp(min=1)
    face_score = torch.where(counts, score.face_score, 0).sum() / number
    loss = -(face_score - settings.baseline) / settings.scale * settings.weight
    return RewardLoss(torch.where(counts.any(), loss, 0 * face_score), face_score)
