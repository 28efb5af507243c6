"""The identity reward: how much the faces of a generated video are the person of a reference video."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .alignment import align_faces
from .detections import FaceDetector, LargestFaces, quantize_frames
from .embedders import FaceEmbedder

_PIXELS_AT_ONCE = 4_000_000  # frame pixels aligned at once: bounds their float copies at about 100 MB

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
        valid: (B,) bool, False where the reference video has no face at all, or, where missing faces are excluded, the
            generated one.
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
    reference_mean = mean_reference(reference, reference_found)
    cosines = frame_cosines(embeddings, reference_mean[:, None])
    return pool_frames(cosines, found, reference_found.any(dim=1), missing_face)


def mean_reference(reference: Tensor, reference_found: Tensor) -> Tensor:
    """(B, D) mean of the (B, R, D) reference embeddings that (B, R) says are faces; 0 where none is."""
    total = torch.where(reference_found[..., None], reference, 0).sum(dim=1)
    return total / reference_found.sum(dim=1).clamp(min=1)[:, None]


def frame_cosines(embeddings: Tensor, reference_mean: Tensor) -> Tensor:
    """(…) mean cosine of each of (…, D) embeddings with the reference embeddings that have this mean (…, D).

    All being of unit norm, it is the dot product with their mean.
    """
    return (embeddings * reference_mean).sum(dim=-1)


def pool_frames(
    cosines: Tensor, found: Tensor, has_reference: Tensor, missing_face: MissingFace = "exclude"
) -> IdentityScore:
    """The scores of B videos from the (B, T) cosines of their frames, which are ignored where no face was found.

    Args:
        found: (B, T) bool.
        has_reference: (B,) bool, whether there is any reference face.
        missing_face: `exclude` or `zero`.
    """
    counted = found & has_reference[:, None]
    frame_scores = torch.where(counted, cosines, 0)
    frame_count = counted.sum(dim=1)
    total = frame_scores.sum(dim=1)
    missing_zero = total / found.shape[1]
    return IdentityScore(
        face_score=missing_zero if missing_face == "zero" else total / frame_count.clamp(min=1),
        frame_scores=frame_scores,
        detection_rate=found.float().mean(dim=1),
        face_score_missing_zero=missing_zero,
        valid=has_reference if missing_face == "zero" else frame_count > 0,
    )


class FrameFaces(NamedTuple):
    """What was seen in N frames.

    Attributes:
        largest: the largest face of each.
        numbers: (N,) int64, how many faces are in each.
        embeddings: (K, D) of the K frames that have a face, in their order.
    """

    largest: LargestFaces
    numbers: Tensor
    embeddings: Tensor

    @classmethod
    def join(cls, parts: Sequence["FrameFaces"]) -> "FrameFaces":
        """Of one or more consecutive runs of frames, what was seen in all of them."""
        faces = [part.largest for part in parts]
        largest = LargestFaces(*(torch.cat([getattr(part, f.name) for part in faces]) for f in fields(LargestFaces)))
        numbers, embeddings = (torch.cat([getattr(part, name) for part in parts]) for name in cls._fields[1:])
        return cls(largest, numbers, embeddings)

    def split(self, lengths: Sequence[int]) -> list["FrameFaces"]:
        """The inverse of `join`: runs of so many frames."""
        found = self.largest.found.split(list(lengths))
        embeddings = self.embeddings.split([int(run.sum()) for run in found])
        columns = zip(*(getattr(self.largest, f.name).split(list(lengths)) for f in fields(LargestFaces)), strict=True)
        faces = [LargestFaces(*column) for column in columns]
        return [FrameFaces(*run) for run in zip(faces, self.numbers.split(list(lengths)), embeddings, strict=True)]


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

    @torch.no_grad()
    def observe(self, pixels: Tensor) -> FrameFaces:
        """The frozen use on (N, 3, H, W) uint8 frames: what `detect` and `embed` give for them as floats, at once."""
        detections = self.detector.detect(pixels, upscale=self.upscale)
        faces = detections.largest()
        numbers = torch.bincount(detections.frame_index, minlength=len(pixels))
        rows = faces.found.nonzero()[:, 0]
        run_length = max(1, _PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
        crops = torch.cat(
            [
                align_faces(pixels[part].float() / 255, faces.landmarks[part], self.image_size)
                for part in rows.split(run_length)  # of no rows, one part without rows
            ]
        )
        return FrameFaces(faces, numbers, self.reference_embedder(crops * 2 - 1))

    def _embed(self, embedder: Callable[[Tensor], Tensor], frames: Tensor, faces: LargestFaces) -> Tensor:
        B, T = frames.shape[:2]
        # The reward is measured in float32 whatever autocast the trainer runs its model in.
        with torch.autocast(frames.device.type, enabled=False):
            crops = align_faces(frames.flatten(0, 1).float(), faces.landmarks.flatten(0, 1), self.image_size)
            return embedder(crops * 2 - 1).unflatten(0, (B, T))
