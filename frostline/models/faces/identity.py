"""The identity reward: similarity of the faces in a generated video to the person in a reference video."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .alignment import align_faces
from .detections import ChosenFaces, Detections, FaceDetector, best_rows, quantize_frames, resize_frames
from .embedders import FaceEmbedder

_PIXELS_AT_ONCE = 4_000_000  # frame pixels aligned at once: limits their float copies to about 100 MB

_FACES_AT_ONCE = 256  # faces embedded at once: a frame may contain many

FaceChoice = Literal["largest", "best"]
"""The face of a frame that counts if there are several: the largest, or the most similar to the reference."""

MissingFace = Literal["exclude", "zero"]
"""The effect of a generated frame without a face on the score: it is ignored, or counts as cosine similarity 0."""


@dataclass(frozen=True, eq=False)
class IdentityScore:
    """Identity scores of B generated videos of T frames. Cosines are in [-1, 1], rates in [0, 1].

    Attributes:
        face_score: (B,) the reward, differentiable. 0 with zero gradient if `valid` is False.
        frame_scores: (B, T) mean cosine of each frame with the reference faces; 0 without a face.
        detection_rate: (B,) fraction of the generated frames with a face.
        face_score_missing_zero: (B,) the score if missing faces count as 0, independent of the setting of the reward.
        valid: (B,) bool, False if the reference video has no face or, if missing faces are ignored, the generated video
            has none.
        compared: (B, T) bool, True for frames with a face in videos whose reference has a face.
    """

    face_score: Tensor
    frame_scores: Tensor
    detection_rate: Tensor
    face_score_missing_zero: Tensor
    valid: Tensor
    compared: Tensor


class ReferenceFaces(NamedTuple):
    """Embedded faces of B reference videos with R frames each.

    Attributes:
        embeddings: (B, R, D) float32, unit norm.
        found: (B, R) bool; the embedding of a frame without a face is undefined.
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
    """Compute the identity reward: every generated face against every reference face.

    Let e_i be the generated and g_j the reference embeddings of frames with a face. The score of a frame is `mean_j
    cos(e_i, g_j)`. The score of a video is the mean over its frames with a face (`exclude`), or over all its frames,
    with 0 for frames without a face (`zero`).

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
    """Return the (B, D) mean of (B, R, D) reference embeddings over the frames with a face; 0 if there are none.

    Args:
        reference_found: (B, R) bool, whether a frame has a face.
    """
    total = torch.where(reference_found[..., None], reference, 0).sum(dim=1)
    return total / reference_found.sum(dim=1).clamp(min=1)[:, None]


def frame_cosines(embeddings: Tensor, reference_mean: Tensor) -> Tensor:
    """Return (…) mean cosines of (…, D) embeddings with the reference embeddings, given the mean (…, D) of the latter.

    Since all embeddings have unit norm, this is the dot product with their mean.
    """
    return (embeddings * reference_mean).sum(dim=-1)


def pool_frames(
    cosines: Tensor, found: Tensor, has_reference: Tensor, missing_face: MissingFace = "exclude"
) -> IdentityScore:
    """Return the scores of B videos from the (B, T) cosines of their frames; cosines without a face are ignored.

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
        compared=counted,
    )


class FrameFaces(NamedTuple):
    """The faces in N frames; K of them were embedded: the largest face of each frame, or all.

    Attributes:
        numbers: (N,) int64, the number of faces in each frame.
        frame_index: (K,) int64, ascending; within a frame the largest face comes first.
        boxes: (K, 4) and landmarks: (K, 5, 2), in pixels.
        embeddings: (K, D) unit norm.
    """

    numbers: Tensor
    frame_index: Tensor
    boxes: Tensor
    landmarks: Tensor
    embeddings: Tensor

    @classmethod
    def join(cls, parts: Sequence["FrameFaces"]) -> "FrameFaces":
        """Concatenate the faces of one or more consecutive batches of frames."""
        moved, start = [], 0
        for part in parts:
            moved.append(part._replace(frame_index=part.frame_index + start))
            start += len(part.numbers)
        return cls(*(torch.cat(column) for column in zip(*moved, strict=True)))

    def split(self, lengths: Sequence[int]) -> list["FrameFaces"]:
        """Split into batches of these numbers of frames, the inverse of `join`."""
        runs, start = [], 0
        for length in lengths:
            own = (self.frame_index >= start) & (self.frame_index < start + length)
            index, *faces = (column[own] for column in self[1:])
            runs.append(FrameFaces(self.numbers[start : start + length], index - start, *faces))
            start += length
        return runs

    def chosen(self, reference_mean: Tensor | None = None) -> "FrameFaces":
        """Return one face of each frame with faces: the most similar to the reference, or the largest without a
        reference.

        Args:
            reference_mean: (D,).
        """
        area = -torch.arange(len(self.frame_index), device=self.frame_index.device)  # the largest comes first
        scores = area if reference_mean is None else frame_cosines(self.embeddings, reference_mean)
        rows = best_rows(self.frame_index, scores)
        return FrameFaces(self.numbers, *(column[rows] for column in self[1:]))


class FaceIdentity:
    """Score videos against references: detect (no gradient), align, embed (gradient to the pixels), compare.

    `detector`, `embedder` and `reference_embedder` are plain attributes that can be replaced by engine-backed ones. An
    embedder takes faces (N, 3, S, S) RGB in [-1, 1] and returns (N, D) unit-norm embeddings. Faces are aligned to the
    template of `embedder`.

    Args:
        detector: finds the faces, without a gradient.
        embedder: embeds generated faces; must be differentiable if the score is used for training.
        upscale: factor by which frames are enlarged for the detector; frames of 64–96 px need 2.
        missing_face: effect of frames without a face on `face_score`.
        face: which face of a generated frame counts. In a reference it is the largest.
        detection_size: longest side in pixels to which frames are resized for the detector, instead of `upscale`.
    """

    def __init__(
        self,
        detector: FaceDetector,
        embedder: FaceEmbedder,
        upscale: int = 1,
        missing_face: MissingFace = "exclude",
        face: FaceChoice = "largest",
        detection_size: int | None = None,
    ) -> None:
        self.detector = detector
        self.embedder: Callable[[Tensor], Tensor] = embedder
        self.reference_embedder: Callable[[Tensor], Tensor] = embedder  # no gradient: may be a frozen engine
        self.image_size = embedder.image_size
        self.template = embedder.template
        self.upscale = upscale
        self.missing_face: MissingFace = missing_face
        self.face: FaceChoice = face
        self.detection_size = detection_size

    @torch.no_grad()
    def detect(self, frames: Tensor, reference_mean: Tensor | None = None) -> ChosenFaces:
        """Detect the scored face in each frame of (B, T, 3, H, W) videos in [0, 1], on 8-bit pixels.

        Args:
            reference_mean: (B, D), to select the most similar face; without it, or if the setting is `largest`, the
                largest face is selected.
        Returns:
            Faces with the leading shape (B, T).
        """
        B, T = frames.shape[:2]
        frames = frames.flatten(0, 1)
        detections = self._detections(quantize_frames(frames))
        rows = detections.largest_rows()
        if self.face == "best" and reference_mean is not None:
            embeddings = self._embed_detections(frames.float(), detections, slice(None))
            videos = detections.frame_index // T
            rows = best_rows(detections.frame_index, frame_cosines(embeddings, reference_mean[videos]))
        return detections.choose(rows).reshape(B, T)

    def embed(self, frames: Tensor, faces: ChosenFaces) -> Tensor:
        """Return (B, T, D) unit-norm embeddings of one face per frame, differentiable w.r.t. the (B, T, 3, H, W) frames
        in [0, 1].

        Frames without a face are embedded too (with substitute landmarks), so that the graph always reaches the frames;
        `identity_score` gives them zero gradient.
        """
        return self._embed(self.embedder, frames, faces)

    @torch.no_grad()
    def references(self, videos: Tensor) -> ReferenceFaces:
        """Return the faces in frames 1 to T-1 of (B, T, 3, H, W) reference videos in [0, 1].

        Frame 0 is excluded because it is the given first frame of the generated video.
        """
        return self.faces_of(videos[:, 1:])

    @torch.no_grad()
    def faces_of(self, frames: Tensor) -> ReferenceFaces:
        """Return the largest face in each of (B, R, 3, H, W) reference pictures in [0, 1]."""
        faces = self.detect(frames)
        return ReferenceFaces(self._embed(self.reference_embedder, frames, faces), faces.found)

    def score(self, frames: Tensor, references: ReferenceFaces) -> IdentityScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1] against the result of `references`."""
        return self.score_against(frames, mean_reference(*references), references.found.any(dim=1))

    def score_against(self, frames: Tensor, reference_mean: Tensor, has_reference: Tensor) -> IdentityScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1] against references.

        Args:
            reference_mean: (B, D) mean embeddings of the references.
            has_reference: (B,) bool, False if there is no reference face and the mean is undefined.
        """
        faces = self.detect(frames, reference_mean)
        cosines = frame_cosines(self.embed(frames, faces), reference_mean[:, None])
        return pool_frames(cosines, faces.found, has_reference, self.missing_face)

    @torch.no_grad()
    def observe(self, pixels: Tensor) -> FrameFaces:
        """Detect and embed faces in (N, 3, H, W) uint8 frames without a gradient, like `detect` and `embed`."""
        detections = self._detections(pixels)
        rows = slice(None) if self.face == "best" else detections.largest_rows()
        embeddings = self._embed_detections(pixels, detections, rows)
        places, boxes, landmarks = detections.frame_index[rows], detections.boxes[rows], detections.landmarks[rows]
        return FrameFaces(detections.numbers(), places, boxes, landmarks, embeddings)

    def _detections(self, pixels: Tensor) -> Detections:
        """Return all faces in (N, 3, H, W) uint8 frames, in pixels of the frames."""
        if self.detection_size is None:
            return self.detector.detect(pixels, upscale=self.upscale)
        found = self.detector.detect(resize_frames(pixels, self.detection_size))
        return found.resized(pixels.shape[-2], pixels.shape[-1])

    def _embed_detections(self, frames: Tensor, detections: Detections, rows: Tensor | slice) -> Tensor:
        """Return (K, D) embeddings, without gradient, of selected faces in (N, 3, H, W) frames, uint8 or in [0, 1]."""
        places, landmarks = detections.frame_index[rows], detections.landmarks[rows]
        run_length = max(1, _PIXELS_AT_ONCE // (frames.shape[-2] * frames.shape[-1]))
        crops = []
        # Without faces, `split` returns one empty part.
        for place, points in zip(places.split(run_length), landmarks.split(run_length), strict=True):
            pictures = frames[place]
            pictures = pictures if pictures.is_floating_point() else pictures.float() / 255
            crops.append(align_faces(pictures, points, self.image_size, self.template))
        embedded = [self.reference_embedder(part * 2 - 1) for part in torch.cat(crops).split(_FACES_AT_ONCE)]
        return torch.cat(embedded)

    def _embed(self, embedder: Callable[[Tensor], Tensor], frames: Tensor, faces: ChosenFaces) -> Tensor:
        B, T = frames.shape[:2]
        # The reward is computed in float32, independent of the trainer's autocast.
        with torch.autocast(frames.device.type, enabled=False):
            pictures, landmarks = frames.flatten(0, 1).float(), faces.landmarks.flatten(0, 1)
            crops = align_faces(pictures, landmarks, self.image_size, self.template)
            return embedder(crops * 2 - 1).unflatten(0, (B, T))
