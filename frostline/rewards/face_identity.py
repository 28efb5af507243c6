"""The face-identity reward of a training step: detection frozen, embedding live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from frostline.config import RewardTerm
from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FaceIdentity, IdentityScore, frame_cosines, mean_reference, pool_frames
from frostline.rewards.reward import ActiveReward, RewardScore
from frostline.runtime.cache import content_key
from frostline.runtime.faces import RuntimeDetector, RuntimeEmbedder
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.runtime import Runtime


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
        self.identity = FaceIdentity(
            RuntimeDetector(runtime), live, settings.upscale, settings.missing_face, settings.face
        )
        self.identity.reference_embedder = RuntimeEmbedder.of(live, runtime)

    def references(self, video: Tensor) -> dict[str, Tensor]:
        """The mean embedding (B, D) of the faces in frames 1…T-1 of (B, T, 3, H, W) videos in [0, 1].

        found: (B,) whether there is any face, without which the mean means nothing.
        """
        faces = self.identity.references(video)
        return {"mean": mean_reference(*faces), "found": faces.found.any(dim=1)}

    def identity_score(self, frames: Tensor, references: Mapping[str, Tensor]) -> IdentityScore:
        """All there is to say of generated (B, T, 3, H, W) frames in [0, 1], differentiable to the frames."""
        faces = self.identity.detect(frames, references["mean"])
        with self.runtime.clock.measure("face_embedder_live", "torch"):
            embeddings = self.identity.embed(frames, faces)
        cosines = frame_cosines(embeddings, references["mean"][:, None])
        return pool_frames(cosines, faces.found, references["found"], self.settings.missing_face)

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
    key = content_key(kept="mean", upscale=term.upscale, min_face_size=term.min_face_size, computation=code)
    return ActiveReward(FaceIdentityReward(term, runtime, embedder), term, key, ("face_detector", "face_embedder"))
