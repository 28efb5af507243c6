"""The face-identity reward: detection is frozen, embedding is live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FaceIdentity, IdentityScore, frame_cosines, mean_reference, pool_frames
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import RewardStages
from frostline.rewards.face_identity import Config as FaceIdentityConfig
from frostline.rewards.face_identity.served import ServedDetector, ServedEmbedder
from frostline.rewards.face_identity.stages import build_face_stages, load_faces
from frostline.rewards.frame_selection import count_selected
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import LiveNetwork, Reward, RewardScore
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange


class FaceIdentityReward(Reward):
    """Scores generated frames against the faces of the reference video."""

    Config = FaceIdentityConfig
    name = "face_score"
    unscored = "no face to compare"

    def __init__(self, config: FaceIdentityConfig) -> None:
        self.config = config
        size, channels = config.detection_size, config.channels
        self.faces = load_faces(config.detector, config.embedder, config.min_face_size, size, channels)
        self.networks = nn.ModuleDict({"detector": self.faces.detector.modules(), "embedder": self.faces.embedder})

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return `face_detector` and `face_embedder`."""
        return build_face_stages(self.faces, shapes)

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        """Return the embedder, used once for the first frame and for each selected frame."""
        embedder = self.faces.embedder
        side = cast(FaceEmbedder, embedder).image_size
        face = torch.zeros(1, 3, side, side, device=self.faces.device)
        frames = count_selected(shape.num_frames, self.config.frames) + 1
        return (LiveNetwork("face_embedder", embedder, (face,), shape.batch_size * frames),)

    def identity(self, run: RewardStages) -> FaceIdentity:
        """Return the scorer: detector and reference embedder on the planned backends, the live embedder in PyTorch."""
        live, config = cast(FaceEmbedder, self.faces.embedder), self.config
        identity = FaceIdentity(
            *(ServedDetector(run), live, config.upscale, config.missing_face, config.face, config.detection_size)
        )
        identity.reference_embedder = ServedEmbedder.of(live, run)
        return identity

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        """Return the mean embedding of the faces in the reference pictures or, without pictures, in frames 1…T-1 of
        the clips.

        In a picture, the largest face counts. The clip of a sample with pictures is not used.

        Returns:
            mean: (B, D), the mean embedding; 0 if no face was found.
            found: (B,) bool, whether any face was found.
        """
        pictures = sample.reference[0] if sample.reference else None
        identity = self.identity(run)
        # Samples with their own pictures are processed one by one.
        faces = identity.references(sample.video) if pictures is None else identity.faces_of(pictures[None])
        return {"mean": mean_reference(*faces), "found": faces.found.any(dim=1)}

    def identity_score(self, frames: Tensor, references: Mapping[str, Tensor], run: RewardStages) -> IdentityScore:
        """Compute all measures of generated (B, T, 3, H, W) frames in [0, 1]; differentiable with respect to the
        frames.
        """
        identity = self.identity(run)
        faces = identity.detect(frames, references["mean"])
        with run.live("face_embedder"):
            embeddings = identity.embed(frames, faces)
        cosines = frame_cosines(embeddings, references["mean"][:, None])
        return pool_frames(cosines, faces.found, references["found"], self.config.missing_face)

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Return the face score and the cosine similarity of each frame.

        The metrics are the detection rate, and the score in which frames without a face count as 0.
        """
        score = self.identity_score(frames, references, run)
        metrics = {
            "detection_rate": score.detection_rate,
            "face_score_missing_zero": score.face_score_missing_zero.detach(),
        }
        cosines = torch.where(score.compared, score.frame_scores.detach(), torch.nan)
        return RewardScore(score.face_score, score.valid, metrics, cosines)
