"""The face-identity reward of a training step: detection frozen, embedding live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from frostline.config import RewardTerm
from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FaceIdentity, IdentityScore, identity_score
from frostline.runtime.cache import content_key
from frostline.runtime.computation import computation_id
from frostline.runtime.faces import RuntimeDetector, RuntimeEmbedder
from frostline.runtime.runtime import Runtime
from frostline.train.reward import ActiveReward, RewardScore


class FaceIdentityReward:
    """Scores generated frames against the faces of the reference video.

    Args:
        embedder: differentiable; the frozen use for references goes through the runtime.
    """

    name = "face_score"

    def __init__(self, settings: RewardTerm, runtime: Runtime, embedder: nn.Module) -> None:
        self.settings = settings
        self.runtime = runtime
        self.embedder = embedder
        live = cast(FaceEmbedder, embedder)
        self.identity = FaceIdentity(RuntimeDetector(runtime), live, settings.upscale, settings.missing_face)
        self.identity.reference_embedder = RuntimeEmbedder.of(live, runtime)

    def references(self, video: Tensor) -> dict[str, Tensor]:
        """`ReferenceFaces` of frames 1…T-1 of (B, T, 3, H, W) reference videos in [0, 1]."""
        return self.identity.references(video)._asdict()

    def identity_score(self, frames: Tensor, references: Mapping[str, Tensor]) -> IdentityScore:
        """All there is to say of generated (B, T, 3, H, W) frames in [0, 1], differentiable to the frames."""
        faces = self.identity.detect(frames)
        with self.runtime.clock.measure("face_embedder_live", "torch"):
            embeddings = self.identity.embed(frames, faces)
        return identity_score(
            embeddings, faces.found, references["embeddings"], references["found"], self.settings.missing_face
        )

    def score(self, frames: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """The face score, with the detection rate beside it."""
        score = self.identity_score(frames, references)
        metrics = {
            "detection_rate": score.detection_rate,
            "face_score_missing_zero": score.face_score_missing_zero.detach(),
        }
        return RewardScore(score.face_score, score.valid, metrics)


def face_identity_reward(term: RewardTerm, runtime: Runtime, embedder: nn.Module) -> ActiveReward:
    """The reward with its part in the loss."""
    code = computation_id([__name__])
    key = content_key(upscale=term.upscale, min_face_size=term.min_face_size, computation=code)
    return ActiveReward(FaceIdentityReward(term, runtime, embedder), term, key, ("face_detector", "face_embedder"))
