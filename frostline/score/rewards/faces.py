"""Score face identity. Only a few numbers per frame of a video, and sums over a reference, are kept in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FrameFaces, frame_cosines, pool_frames
from frostline.rewards.active import ActiveReward
from frostline.rewards.face_identity.reward import FaceIdentityReward
from frostline.runtime.runtime import Runtime
from frostline.score.decoding import Chunk
from frostline.score.request import Pair
from frostline.score.rewards.base import ReferenceTrack, RewardResult, ScoredReward, VideoTrack

_DIGITS = 7


class FaceReward(ScoredReward):
    """Score `face_identity`: detect and embed the faces of all frames. Frames are not kept."""

    def __init__(self, label: str, active: ActiveReward, runtime: Runtime, device: torch.device, batch: int) -> None:
        super().__init__(label, active, runtime, device, batch)
        reward = cast(FaceIdentityReward, active.reward)
        self.config = reward.config
        self.identity = reward.identity(self.run)
        self.names = reward.faces.detector.name, cast(FaceEmbedder, reward.faces.embedder).name

    def provenance(self) -> Mapping[str, str]:
        """Return the names and backends of detector and embedder."""
        backends = self.backends()
        return {
            "face_detector": self.names[0],
            "face_detector_backend": backends["face_detector"],
            "face_embedder": self.names[1],
            "face_embedder_backend": backends["face_embedder"],
        }

    def reference(self, pair: Pair) -> FaceReference:
        """Return the initial state of a reference: a picture or video of the person."""
        return FaceReference(pair.reference)

    def video(self, pair: Pair, reference: ReferenceTrack | None) -> FaceVideo:
        """Return the initial state of a video, which is compared with the mean embedding of the reference."""
        assert isinstance(reference, FaceReference)
        return FaceVideo(self, reference)

    def observe(self, parts: Sequence[Tensor]) -> list[FrameFaces]:
        """Detect and embed the faces of each part."""
        frames = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        seen = FrameFaces.join([self.identity.observe(run.to(self.device)) for run in frames.split(self.batch)])
        return seen.split([len(part) for part in parts])


class FaceReference(ReferenceTrack):
    """Accumulate the face embeddings of a reference. Only sums are kept, so memory does not grow with the video length.

    Frame 0 of a video is not used, as in training, where it is the first frame of the generated video.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.total: Tensor | float = 0.0
        self.faces = 0
        self.frames = 0
        self.first: tuple[Tensor | float, int] = (0.0, 0)
        self.crowded = 0
        self.most_faces = 0

    def add(self, chunk: Chunk, seen: FrameFaces) -> None:
        """Add the embedding of the largest face of each frame."""
        embeddings = seen.chosen().embeddings
        total, faces = embeddings.double().sum(dim=0), len(embeddings)
        if self.frames == 0:
            head = int(seen.numbers[0] > 0)
            self.first = (embeddings[:head].double().sum(dim=0), head)
        self.total, self.faces, self.frames = self.total + total, self.faces + faces, self.frames + len(seen.numbers)
        self.crowded += int((seen.numbers > 1).sum())
        self.most_faces = max(self.most_faces, int(seen.numbers.max()))

    def finish(self) -> None:
        """Remove the first frame of a video, and set `fault` if no face was found."""
        if self.crowded:
            where = f"in {self.crowded} of its {self.frames} frames, up to " if self.frames > 1 else ""
            self.note = f"{where}{self.most_faces} faces were found; the largest is used"
        if self.frames > 1:
            self.total, self.faces = self.total - self.first[0], self.faces - self.first[1]
        if not self.faces:
            self.fault = f"{self.path}: no face was found"

    @property
    def mean(self) -> Tensor:
        """Return the mean embedding, (D,) float32. Only valid without a fault."""
        assert isinstance(self.total, Tensor)
        return (self.total / self.faces).float()


@dataclass(frozen=True)
class Extreme:
    """The frame with the lowest or highest score so far.

    Attributes:
        number: the index of the frame in the file.
        score: the cosine similarity with the reference.
        box: left, top, right and bottom of the face in pixels.
        landmarks: the five landmarks (x, y) in pixels.
    """

    number: int
    score: float
    box: tuple[float, ...]
    landmarks: tuple[tuple[float, float], ...]


class FaceVideo(VideoTrack):
    """The state of a video: a few numbers per frame."""

    def __init__(self, reward: FaceReward, reference: FaceReference) -> None:
        super().__init__()
        self.reward = reward
        self.reference = reference
        self.numbers: list[int] = []
        self.found: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.max_faces = 0
        self.worst: Extreme | None = None
        self.best: Extreme | None = None

    def add(self, chunk: Chunk, seen: FrameFaces) -> None:
        """Compare the faces of a chunk with the mean embedding of the reference."""
        mean, face = self.reference.mean, self.reward.config.face
        faces, found = seen.chosen(mean if face == "best" else None), seen.numbers > 0
        cosines = found.new_zeros(len(found), dtype=torch.float32)
        cosines[found] = frame_cosines(faces.embeddings, mean)
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

    def result(self) -> RewardResult:
        """Pool the cosine similarities of all frames."""
        missing_face = self.reward.config.missing_face
        found, cosines = torch.cat(self.found), torch.cat(self.cosines)
        pooled = pool_frames(cosines[None], found[None], torch.ones(1, dtype=torch.bool), missing_face)
        scored = bool(pooled.valid) or missing_face == "zero"
        scores = zip(cosines.tolist(), found.tolist(), strict=True)
        columns = {
            "face_score": round(pooled.face_score.item(), _DIGITS) if scored else None,
            "detection_rate": round(pooled.detection_rate.item(), _DIGITS),
            "face_score_missing_zero": round(pooled.face_score_missing_zero.item(), _DIGITS),
            "frames_with_face": int(found.sum()),
            "max_faces": self.max_faces,
            "frame_numbers": tuple(self.numbers),
            "frame_scores": tuple(round(score, _DIGITS) if face else None for score, face in scores),
            **_extreme_columns("worst", self.worst),
            **_extreme_columns("best", self.best),
        }
        return RewardResult(columns, note="" if self.max_faces else "no face was found in any frame")


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
