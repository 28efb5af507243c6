"""The identity reward: how much the faces of a generated video are the person of a reference video."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .alignment import align_faces
from .detections import FaceDetector, LargestFaces, quantize_frames
from .embedders import FaceEmbedder

MissingFace = Literal["exclude", "zero"]
"""What a generated frame without a face does to the score: it does not count, or it counts as cosine 0."""


@dataclass(frozen=True, eq=False)
class IdentityScore:
    """Identity of B generated videos of T frames with their references. Cosines lie in [-1, 1], rates in
    [0, 1].

    Attributes:
        face_score: (B,) the reward, differentiable. 0 with zero gradient where `valid` is False.
        frame_scores: (B, T) mean cosine of each frame with the reference faces; 0 where there is no face.
        detection_rate: (B,) share of the generated frames that have a face.
        face_score_missing_zero: (B,) the score when missing faces count as 0, whatever the reward uses.
        valid: (B,) bool, False where the generated or the reference video has no face at all.
    """

    face_score: Tensor
    frame_scores: Tensor
    detection_rate: Tensor
    face_score_missing_zero: Tensor
    valid: Tensor


class ReferenceFaces(NamedTuple):
    """Embedded faces of B reference videos, R frames each.

    Attributes:
        embeddings: (B, R, D) float32, unit norm.
        found: (B, R) bool; the embedding of a frame without a face has no meaning.
    """

    embeddings: Tensor
    found: Tensor


def identity_score(
    embeddings: Tensor,
    found: Tensor,
    reference: Tensor,
    reference_found: Tensor,
    missing_face: MissingFace = "exclude",
) -> IdentityScore:
    """The pooled identity reward: every generated face against every reference face.

    With e_i the generated and g_j the reference embeddings of frames that have a face, a frame scores
    `mean_j cos(e_i, g_j)`, and a video scores the mean over its frames with a face (`exclude`) or over all
    its frames, one without a face counting 0 (`zero`).

    Args:
        embeddings: (B, T, D) unit norm, differentiable. Values at frames without a face are ignored.
        found: (B, T) bool.
        reference: (B, R, D) unit norm. R may be 0.
        reference_found: (B, R) bool.
        missing_face: `exclude` or `zero`.
    """
    # The mean cosine with unit vectors is the dot product with their mean.
    reference_count = reference_found.sum(dim=1)
    reference_sum = torch.where(reference_found[..., None], reference, 0).sum(dim=1)
    reference_mean = reference_sum / reference_count.clamp(min=1)[:, None]

    counted = found & (reference_count > 0)[:, None]
    cosines = (embeddings * reference_mean[:, None]).sum(dim=-1)
    frame_scores = torch.where(counted, cosines, 0)
    frame_count = counted.sum(dim=1)
    total = frame_scores.sum(dim=1)
    missing_zero = total / found.shape[1]
    return IdentityScore(
        face_score=missing_zero if missing_face == "zero" else total / frame_count.clamp(min=1),
        frame_scores=frame_scores,
        detection_rate=found.float().mean(dim=1),
        face_score_missing_zero=missing_zero,
        valid=frame_count > 0,
    )


class FaceIdentity:
    """Scores videos against references: detect (no gradient), align, embed (gradient to the pixels), compare.

    `detector`, `embedder` and `reference_embedder` are plain attributes: assign engine-backed ones to swap
    them. An embedder takes faces (N, 3, S, S) RGB in [-1, 1] and returns (N, D) unit-norm embeddings.

    Args:
        detector: finds the faces; no gradient flows through it.
        embedder: embeds generated faces; must be differentiable if the score is to be trained on.
        upscale: how many times larger the detector sees the frames; frames of 64–96 px need 2.
        missing_face: what frames without a face do to `face_score`.
    """

    def __init__(
        self,
        detector: FaceDetector,
        embedder: FaceEmbedder,
        upscale: int = 1,
        missing_face: MissingFace = "exclude",
    ) -> None:
        self.detector = detector
        self.embedder: Callable[[Tensor], Tensor] = embedder
        self.reference_embedder: Callable[[Tensor], Tensor] = embedder  # no gradient: may be a frozen engine
        self.image_size = embedder.image_size
        self.upscale = upscale
        self.missing_face: MissingFace = missing_face

    @torch.no_grad()
    def detect(self, frames: Tensor) -> LargestFaces:
        """The largest face of each frame of (B, T, 3, H, W) videos in [0, 1], searched in their 8-bit pixels.

        The leading shape of the result is (B, T).
        """
        B, T = frames.shape[:2]
        pixels = quantize_frames(frames.flatten(0, 1))
        return self.detector.detect(pixels, upscale=self.upscale).largest().reshape(B, T)

    def embed(self, frames: Tensor, faces: LargestFaces) -> Tensor:
        """(B, T, D) unit-norm embeddings of one face a frame, differentiable to the (B, T, 3, H, W) frames
        in [0, 1].

        Frames without a face are embedded too (aligned by their stand-in landmarks), so that the graph always
        reaches the frames; `identity_score` gives them zero gradient.
        """
        return self._embed(self.embedder, frames, faces)

    @torch.no_grad()
    def references(self, videos: Tensor) -> ReferenceFaces:
        """Faces of the frames 1…T-1 of (B, T, 3, H, W) reference videos in [0, 1].

        Frame 0 is left out: it is the start frame that the generated video is given.
        """
        frames = videos[:, 1:]
        faces = self.detect(frames)
        return ReferenceFaces(self._embed(self.reference_embedder, frames, faces), faces.found)

    def score(self, frames: Tensor, references: ReferenceFaces) -> IdentityScore:
        """Identity of generated (B, T, 3, H, W) frames in [0, 1] with what `references` returned."""
        faces = self.detect(frames)
        embeddings = self.embed(frames, faces)
        return identity_score(embeddings, faces.found, references.embeddings, references.found, self.missing_face)

    def _embed(self, embedder: Callable[[Tensor], Tensor], frames: Tensor, faces: LargestFaces) -> Tensor:
        B, T = frames.shape[:2]
        # The reward is measured in float32 whatever autocast the trainer runs its model in.
        with torch.autocast(frames.device.type, enabled=False):
            crops = align_faces(frames.flatten(0, 1).float(), faces.landmarks.flatten(0, 1), self.image_size)
            return embedder(crops * 2 - 1).unflatten(0, (B, T))
