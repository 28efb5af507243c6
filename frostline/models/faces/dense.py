"""Shared code of the single-network detectors (YuNet, SCRFD): candidates on three grids, for batches of frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .detections import Detections, check_frames, join_detections, no_detections, upscale_frames
from .nms import nms

STRIDES = (8, 16, 32)
"""Distance in pixels between neighbouring cells of the three grids."""

MULTIPLE = STRIDES[-1]
"""Frames are padded on the right and at the bottom until their sides are multiples of this."""

_PIXELS_AT_ONCE = 4_000_000  # frame pixels processed at once: limits the activations to about 400 MB


@dataclass(frozen=True, eq=False)
class Candidates:
    """K candidate faces in N frames, before non-maximum suppression.

    Attributes:
        boxes: (K, 4) float32 left, top, right, bottom.
        scores: (K,) in [0, 1].
        landmarks: (K, 5, 2) x, y.
        frame_index: (K,) int64.
        rivals: (K, 4), the boxes between which the overlap (IoU) is computed.
    """

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor
    frame_index: Tensor
    rivals: Tensor

    def best(self, overlap: float, num_frames: int, frame_size: tuple[int, int]) -> Detections:
        """Return the faces after non-maximum suppression within each frame.

        Args:
            overlap: IoU above which the candidate with the lower score is removed.
            num_frames: N.
            frame_size: (H, W) of the frames in pixels.
        """
        # Process all frames in one call, with boxes shifted apart by frame, in fp64 to avoid rounding errors.
        rivals = self.rivals.double()
        reach = (rivals.abs().amax() + 1).ceil() if len(rivals) else rivals.new_ones(())
        shifted = rivals + (self.frame_index * (2 * reach))[:, None]
        kept = nms(shifted, self.scores.double(), overlap)
        size = (self.boxes[kept, 2:] - self.boxes[kept, :2]).double()
        kept = kept[size.prod(dim=1).argsort(descending=True, stable=True)]
        kept = kept[self.frame_index[kept].argsort(stable=True)]
        return Detections(
            boxes=self.boxes[kept],
            probabilities=self.scores[kept],
            landmarks=self.landmarks[kept],
            frame_index=self.frame_index[kept],
            num_frames=num_frames,
            frame_size=frame_size,
        )


def detect_in_parts(frames: Tensor, upscale: int, find: Callable[[Tensor], Candidates], overlap: float) -> Detections:
    """Detect faces in (N, 3, H, W) uint8 RGB frames, a part of them at a time; N may be 0.

    Args:
        find: returns the candidates in (n, 3, h, w) uint8 RGB frames, n >= 1, in pixels of these frames.
        overlap: see `Candidates.best`.
    """
    check_frames(frames)
    size = (frames.shape[-2], frames.shape[-1])
    if len(frames) == 0:
        return no_detections(0, size, frames.device)
    run_length = max(1, _PIXELS_AT_ONCE // (size[0] * size[1] * upscale**2))
    searched = (size[0] * upscale, size[1] * upscale)
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        parts = [
            find(upscale_frames(part, upscale)).best(overlap, len(part), searched) for part in frames.split(run_length)
        ]
    return join_detections(parts).divided(upscale)


def padded(height: int, width: int) -> tuple[int, int]:
    """Return height and width in pixels, rounded up to multiples of the largest stride."""
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def cell_places(cells: Tensor, width: int, anchors: int, stride: int) -> Tensor:
    """Return (K, 2) x, y in pixels of the top left corners of cells.

    Args:
        cells: (K,) indices of candidates, in row-major order of the cells.
        width: width of the frames in pixels.
        anchors: number of candidates per cell.
        stride: pixels between neighbouring cells.
    """
    place = cells // anchors
    columns = width // stride
    return stride * torch.stack([place % columns, place // columns], dim=1).float()


def gather_strides(pick: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Return boxes, scores, landmarks and frames of the candidates that `pick` finds at each stride, concatenated."""
    return tuple(torch.cat(parts) for parts in zip(*map(pick, STRIDES), strict=True))
