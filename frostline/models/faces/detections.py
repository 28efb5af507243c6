"""The output of face detectors, and their input: 8-bit pixels, enlarged if faces are small."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import DataError

from .alignment import scaled_template

_PIXELS_AT_ONCE = 4_000_000  # frame pixels resized at once: limits their float copies to about 100 MB


@dataclass(frozen=True, eq=False)
class ChosenFaces:
    """The selected face of each frame. The leading shape is `(N,)`, or `(B, T)` after `reshape`.

    Attributes:
        found: (N,) bool.
        boxes: (N, 4) float32 left, top, right, bottom in pixels; 0 if no face was found.
        landmarks: (N, 5, 2) float32 x, y in pixels. If no face was found: the ArcFace template stretched over the
            frame, so that aligning such a frame stays finite.
        probability: (N,) float32 in [0, 1]; 0 if no face was found.
    """

    found: Tensor
    boxes: Tensor
    landmarks: Tensor
    probability: Tensor

    def reshape(self, *leading: int) -> "ChosenFaces":
        """Return the same faces with another leading shape, for example `faces.reshape(B, T)`."""
        return ChosenFaces(
            found=self.found.reshape(leading),
            boxes=self.boxes.reshape(*leading, 4),
            landmarks=self.landmarks.reshape(*leading, 5, 2),
            probability=self.probability.reshape(leading),
        )


@dataclass(frozen=True, eq=False)
class Detections:
    """All faces of a batch of frames, ordered by frame, and within a frame by descending box area.

    Attributes:
        boxes: (M, 4) float32 left, top, right, bottom in pixels; may extend beyond the frame.
        probabilities: (M,) float32 in [0, 1].
        landmarks: (M, 5, 2) float32 x, y in pixels: eyes, nose, corners of the mouth, left before right.
        frame_index: (M,) int64, ascending.
        num_frames: N, the number of searched frames.
        frame_size: (H, W) of those frames in pixels.
    """

    boxes: Tensor
    probabilities: Tensor
    landmarks: Tensor
    frame_index: Tensor
    num_frames: int
    frame_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.boxes)

    def numbers(self) -> Tensor:
        """Return (N,) int64, the number of faces in each frame."""
        return torch.bincount(self.frame_index, minlength=self.num_frames)

    def largest_rows(self) -> Tensor:
        """Return the index of the largest detection (by box area) of each frame, which is the frame's first."""
        frames = torch.arange(self.num_frames, device=self.boxes.device)
        return torch.searchsorted(self.frame_index, frames)[self.numbers() > 0]

    def largest(self) -> ChosenFaces:
        """Select the largest face of each of the N frames."""
        return self.choose(self.largest_rows())

    def choose(self, rows: Tensor) -> ChosenFaces:
        """Select these detections, at most one in each frame; other frames count as frames without a face."""
        device, frames = self.boxes.device, self.frame_index[rows]
        found = torch.zeros(self.num_frames, dtype=torch.bool, device=device)
        boxes = torch.zeros(self.num_frames, 4, device=device)
        landmarks = scaled_template(*self.frame_size).to(boxes).repeat(self.num_frames, 1, 1)
        probability = torch.zeros(self.num_frames, device=device)
        found[frames] = True
        boxes[frames] = self.boxes[rows]
        landmarks[frames] = self.landmarks[rows]
        probability[frames] = self.probabilities[rows]
        return ChosenFaces(found, boxes, landmarks, probability)

    def divided(self, factor: int) -> "Detections":
        """Return these detections in pixels of frames with sides `factor` times smaller."""
        height, width = self.frame_size
        return replace(
            self,
            boxes=(self.boxes + 0.5) / factor - 0.5,
            landmarks=(self.landmarks + 0.5) / factor - 0.5,
            frame_size=(height // factor, width // factor),
        )

    def resized(self, height: int, width: int) -> "Detections":
        """Return these detections in pixels of the original frames, which had `height` and `width` before resizing."""
        scale = self.boxes.new_tensor([width / self.frame_size[1], height / self.frame_size[0]])
        corners = (self.boxes.unflatten(1, (2, 2)) + 0.5) * scale - 0.5
        landmarks = (self.landmarks + 0.5) * scale - 0.5
        return replace(self, boxes=corners.flatten(1), landmarks=landmarks, frame_size=(height, width))


class FaceDetector(Protocol):
    """Finds faces in frames; `BatchedMTCNN` is an example."""

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Detect faces in (N, 3, H, W) uint8 RGB frames, enlarged `upscale` times; the result is in pixels of the
        frames.
        """
        ...


def check_frames(frames: Tensor) -> None:
    """Check that frames are (N, 3, H, W) uint8.

    Raises:
        DataError: they are not; the message gives their shape and dtype.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        got = f"{tuple(frames.shape)} {frames.dtype}"
        raise DataError(f"face detection takes (N, 3, H, W) uint8 frames, not {got}")


def no_detections(num_frames: int, frame_size: tuple[int, int], device: torch.device) -> Detections:
    """Return empty detections for `num_frames` frames of size `frame_size`, (H, W), without a face."""
    return Detections(
        boxes=torch.zeros(0, 4, device=device),
        probabilities=torch.zeros(0, device=device),
        landmarks=torch.zeros(0, 5, 2, device=device),
        frame_index=torch.zeros(0, dtype=torch.int64, device=device),
        num_frames=num_frames,
        frame_size=frame_size,
    )


def best_rows(frame_index: Tensor, scores: Tensor) -> Tensor:
    """Return the index of the best of (M,) faces in each frame by score, ascending; the first if scores are equal."""
    order = scores.argsort(descending=True, stable=True)
    order = order[frame_index[order].argsort(stable=True)]
    ordered = frame_index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Concatenate the detections of one or more consecutive batches of equally sized frames."""
    starts = torch.tensor([0, *(part.num_frames for part in parts)]).cumsum(0).tolist()
    return Detections(
        boxes=torch.cat([part.boxes for part in parts]),
        probabilities=torch.cat([part.probabilities for part in parts]),
        landmarks=torch.cat([part.landmarks for part in parts]),
        frame_index=torch.cat([part.frame_index + start for part, start in zip(parts, starts, strict=False)]),
        num_frames=starts[-1],
        frame_size=parts[0].frame_size,
    )


def quantize_frames(frames: Tensor) -> Tensor:
    """Convert frames in [0, 1] to the uint8 pixels of a video file: times 255, rounded, clamped.

    Detection in training then sees the same pixels as detection in the written video.
    """
    return (frames.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def upscale_frames(frames: Tensor, factor: int) -> Tensor:
    """Enlarge (N, 3, H, W) uint8 frames, N >= 1, `factor` times on each side (bicubic), and round to uint8."""
    if factor == 1:
        return frames
    enlarged = F.interpolate(frames.float(), scale_factor=factor, mode="bicubic", align_corners=False)
    return enlarged.round().clamp(0, 255).to(torch.uint8)


def resize_frames(frames: Tensor, longest_side: int) -> Tensor:
    """Resize (N, 3, H, W) uint8 frames so that the longest side has this many pixels, and round to uint8.

    Bicubic in both directions. Enlarging by an integer factor equals `upscale_frames`; shrinking averages pixels first,
    as Pillow does.
    """
    height, width = frames.shape[-2:]
    longest = max(height, width)
    if longest == longest_side or len(frames) == 0:
        return frames
    size = tuple(max(1, round(side * longest_side / longest)) for side in (height, width))
    run_length = max(1, _PIXELS_AT_ONCE // max(height * width, size[0] * size[1]))
    parts = [
        F.interpolate(part.float(), size, mode="bicubic", align_corners=False, antialias=longest > longest_side)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for part in frames.split(run_length)
    ]
    return torch.cat(parts)
