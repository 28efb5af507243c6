"""What is remembered of references and videos while their frames come in: a few numbers a frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frostline.models.faces.identity import FaceChoice, FrameFaces, MissingFace, frame_cosines, pool_frames
from frostline.score.decoding import Chunk
from frostline.score.request import Pair

_DIGITS = 7


@dataclass
class ReferenceSum:
    """The faces of a reference: sums, so that a long video takes no more memory than a picture.

    Of a video, frame 0 is left out as in training: there, it is the start frame that the generated video is given.
    """

    total: Tensor | float = 0.0
    faces: int = 0
    frames: int = 0
    error: str = ""
    first: tuple[Tensor | float, int] = (0.0, 0)
    crowded: int = 0
    most_faces: int = 0
    note: str = ""

    def add(self, seen: FrameFaces) -> None:
        """What was seen in some frames, of each of which the largest face counts."""
        embeddings = seen.chosen().embeddings
        total, faces = embeddings.double().sum(dim=0), len(embeddings)
        if self.frames == 0:
            head = int(seen.numbers[0] > 0)
            self.first = (embeddings[:head].double().sum(dim=0), head)
        self.total, self.faces, self.frames = self.total + total, self.faces + faces, self.frames + len(seen.numbers)
        self.crowded += int((seen.numbers > 1).sum())
        self.most_faces = max(self.most_faces, int(seen.numbers.max()))

    def end(self, error: str, note: str, path: str) -> None:
        """All frames were added, and what there is to tell of their file is this."""
        crowd = ""
        if self.crowded:
            where = f"in {self.crowded} of its {self.frames} frames " if self.frames > 1 else ""
            crowd = f"{where}{self.most_faces} faces were found, of which the largest counts"
        self.note = "; ".join(filter(None, (note, crowd)))
        if self.frames > 1:
            self.total, self.faces = self.total - self.first[0], self.faces - self.first[1]
        self.error = f"the reference cannot be used: {error}" if error else ""
        if not error and not self.faces:
            self.error = f"the reference cannot be used: {path}: no face was found in it"

    @property
    def mean(self) -> Tensor:
        """(D,) float32; only of a reference without error."""
        assert isinstance(self.total, Tensor)
        return (self.total / self.faces).float()


@dataclass(frozen=True)
class Extreme:
    """The frame with the lowest or highest score so far, and where its face is."""

    number: int
    score: float
    box: tuple[float, ...]
    landmarks: tuple[tuple[float, float], ...]


@dataclass
class VideoFrames:
    """What is known of a video while its frames come in. A few numbers a frame, whatever its length."""

    pair: Pair
    size: tuple[int, int] = (0, 0)
    numbers: list[int] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    max_faces: int = 0
    worst: Extreme | None = None
    best: Extreme | None = None
    seconds: float = 0.0

    def add(self, chunk: Chunk, seen: FrameFaces, mean: Tensor, face: FaceChoice) -> None:
        """The frames of a chunk, as they were seen, against the mean of the reference embeddings."""
        faces, found = seen.chosen(mean if face == "best" else None), seen.numbers > 0
        cosines = found.new_zeros(len(found), dtype=torch.float32)
        cosines[found] = frame_cosines(faces.embeddings, mean)
        self.size = (chunk.frames.shape[-1], chunk.frames.shape[-2])
        self.numbers += chunk.numbers
        self.found.append(found.cpu())
        self.cosines.append(cosines.cpu())
        self.max_faces = max(self.max_faces, int(seen.numbers.max()))
        if found.any():
            lowest = int(torch.where(found, cosines, torch.inf).argmin())
            highest = int(torch.where(found, cosines, -torch.inf).argmax())
            if self.worst is None or cosines[lowest] < self.worst.score:
                self.worst = _extreme_at(lowest, chunk, faces, cosines)
            if self.best is None or cosines[highest] > self.best.score:
                self.best = _extreme_at(highest, chunk, faces, cosines)

    def columns(self, missing_face: MissingFace) -> dict[str, Any]:
        """What the frames came to, as fields of `VideoScore`."""
        found, cosines = torch.cat(self.found), torch.cat(self.cosines)
        pooled = pool_frames(cosines[None], found[None], torch.ones(1, dtype=torch.bool), missing_face)
        scored = bool(pooled.valid) or missing_face == "zero"
        scores = zip(cosines.tolist(), found.tolist(), strict=True)
        return {
            "face_score": round(pooled.face_score.item(), _DIGITS) if scored else None,
            "detection_rate": round(pooled.detection_rate.item(), _DIGITS),
            "face_score_missing_zero": round(pooled.face_score_missing_zero.item(), _DIGITS),
            "frames": len(found),
            "frames_with_face": int(found.sum()),
            "max_faces": self.max_faces,
            "width": self.size[0],
            "height": self.size[1],
            "frame_numbers": tuple(self.numbers),
            "frame_scores": tuple(round(score, _DIGITS) if face else None for score, face in scores),
            **_extreme_columns("worst", self.worst),
            **_extreme_columns("best", self.best),
        }


def _extreme_at(index: int, chunk: Chunk, faces: FrameFaces, cosines: Tensor) -> Extreme:
    row = int(torch.searchsorted(faces.frame_index, index))
    box, points = faces.boxes[row].tolist(), faces.landmarks[row].tolist()
    return Extreme(
        number=chunk.numbers[index],
        score=cosines[index].item(),
        box=tuple(round(side, 2) for side in box),
        landmarks=tuple((round(x, 2), round(y, 2)) for x, y in points),
    )


def _extreme_columns(which: str, extreme: Extreme | None) -> dict[str, Any]:
    if extreme is None:
        return {}
    return {
        f"{which}_frame": extreme.number,
        f"{which}_frame_score": round(extreme.score, _DIGITS),
        f"{which}_frame_box": extreme.box,
        f"{which}_frame_landmarks": extreme.landmarks,
    }
