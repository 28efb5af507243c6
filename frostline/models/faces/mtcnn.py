"""MTCNN face detection for batches of frames, equal to facenet-pytorch's `MTCNN.detect` on each frame.

Method: Zhang et al. 2016, "Joint Face Detection and Alignment Using Multi-task Cascaded Convolutional Networks".

P-Net proposes boxes on an image pyramid, R-Net rejects and refines them, O-Net decides and predicts five landmarks.
Networks, weights and operations are those of facenet-pytorch; only the batching differs: P-Net processes all frames at
one scale at once, R-Net and O-Net process the candidates of all frames, and all candidates are cropped in one gather.
The networks are passed in, so that engines can run them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .detections import Detections, check_frames, join_detections, no_detections, upscale_frames
from .mtcnn_networks import MTCNN_INPUT_SIZES, MTCNN_OUTPUTS, load_mtcnn_networks
from .networks import Network, as_network
from .nms import nms

_PNET_CELL = 12  # receptive field of a P-Net output in pixels ...
_PNET_STRIDE = 2  # ... and the distance between two outputs
_NETWORK_BATCH = 1024  # candidates in a call of R-Net or O-Net: limits memory to about 100 MB
_PIXELS_AT_ONCE = 16_000_000  # frame pixels processed at once: limits the pyramid to about 300 MB


class BatchedMTCNN:
    """Detect faces in all frames of a batch at once. Contains no weights: see `networks`.

    Args:
        networks: `pnet`, `rnet` and `onet` as `Network` functions on the device of the frames; None loads
            facenet-pytorch's networks in PyTorch, for frames on the CPU.
        min_face_size: side in pixels of the smallest face to find.
        thresholds: minimum probabilities after P-Net, R-Net and O-Net.
        factor: ratio of neighbouring scales of the pyramid.
    """

    def __init__(
        self,
        networks: Mapping[str, Network] | None = None,
        min_face_size: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
    ) -> None:
        if networks is None:
            networks = {name: as_network(m, MTCNN_OUTPUTS[name]) for name, m in load_mtcnn_networks().items()}
        self.networks = networks
        self.min_face_size = min_face_size
        self.thresholds = thresholds
        self.factor = factor

    @torch.no_grad()
    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Detect faces in all frames; the result for a frame does not depend on the other frames.

        Frames without a face, or too small to contain one, have no detections; N may be 0.

        Args:
            frames: (N, 3, H, W) uint8 RGB.
            upscale: factor by which frames are enlarged (bicubic) to find smaller faces: the frames of 64–96 px in the
                tests and of the built-in model need 2.
        """
        check_frames(frames)
        height, width = frames.shape[-2:]
        if len(frames) == 0 or not self._scales(height * upscale, width * upscale):
            return no_detections(len(frames), (height, width), frames.device)
        run_length = max(1, _PIXELS_AT_ONCE // (height * width * upscale**2))
        with torch.autocast(frames.device.type, enabled=False):
            parts = [self._detect(upscale_frames(part, upscale)) for part in frames.split(run_length)]
        return join_detections(parts).divided(upscale)

    def _detect(self, frames: Tensor) -> Detections:
        """Detect faces in (N, 3, H, W) uint8 frames, N >= 1: propose, refine, decide."""
        integral = _integral_image(frames)
        boxes, frame_index = _inside(integral, *self._propose(frames))
        if len(boxes):
            boxes, frame_index = _inside(integral, *self._refine(integral, boxes, frame_index))
        if not len(boxes):
            return no_detections(len(frames), integral.frame_size, frames.device)
        return self._decide(integral, boxes, frame_index)

    def _scales(self, height: int, width: int) -> list[float]:
        """Return the scales of the pyramid, largest first; none if the frame is smaller than the smallest face."""
        scale = _PNET_CELL / self.min_face_size
        shortest = min(height, width) * scale
        scales = []
        while shortest >= _PNET_CELL:
            scales.append(scale)
            scale = scale * self.factor
            shortest = shortest * self.factor
        return scales

    def _propose(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return square candidate boxes (K, 4) and their frames (K,) from P-Net at every scale."""
        pixels = frames.float()
        proposals = [self._propose_at(pixels, scale, len(frames)) for scale in self._scales(*frames.shape[-2:])]
        boxes, scores, regression, frame_index = map(torch.cat, zip(*proposals, strict=True))
        keep = _nms_per_frame(boxes, scores, frame_index, 0.7, len(frames))
        boxes, regression = boxes[keep], regression[keep]
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return _squared(boxes + regression * size), frame_index[keep]

    def _propose_at(self, pixels: Tensor, scale: float, num_frames: int) -> tuple[Tensor, ...]:
        """Return boxes (K, 4), scores (K,), regression (K, 4) and frames (K,) for (N, 3, H, W) pixels at one scale."""
        height, width = pixels.shape[-2:]
        resized = F.interpolate(pixels, (int(height * scale + 1), int(width * scale + 1)), mode="area")
        outputs = self.networks["pnet"](images=_normalized(resized))
        probability = outputs["probability"]
        frame_index, y, x = torch.nonzero(probability >= self.thresholds[0], as_tuple=True)
        scores = probability[frame_index, y, x]
        regression = outputs["regression"][frame_index, :, y, x]

        corner = _PNET_STRIDE * torch.stack([x, y], dim=1).float()
        boxes = torch.cat([(corner + 1) / scale, (corner + _PNET_CELL) / scale], dim=1).floor()
        keep = _nms_per_frame(boxes, scores, frame_index, 0.5, num_frames)
        return boxes[keep], scores[keep], regression[keep], frame_index[keep]

    def _refine(self, integral: "IntegralImage", boxes: Tensor, frame_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates that R-Net accepts, moved by its regression and made square."""
        regression, scores = self._classify("rnet", integral, boxes, frame_index)
        accepted = scores > self.thresholds[1]
        boxes, scores, regression, frame_index = (part[accepted] for part in (boxes, scores, regression, frame_index))
        keep = _nms_per_frame(boxes, scores, frame_index, 0.7, integral.num_frames)
        return _squared(_moved(boxes[keep], regression[keep])), frame_index[keep]

    def _decide(self, integral: "IntegralImage", boxes: Tensor, frame_index: Tensor) -> Detections:
        """Return the faces among the candidates by O-Net, in the order of `Detections`."""
        regression, landmarks, scores = self._classify("onet", integral, boxes, frame_index)
        accepted = scores > self.thresholds[2]
        boxes, scores, regression, landmarks, frame_index = (
            part[accepted] for part in (boxes, scores, regression, landmarks, frame_index)
        )
        size = boxes[:, 2:] - boxes[:, :2] + 1
        points = torch.stack(
            [
                size[:, :1] * landmarks[:, :5] + boxes[:, :1] - 1,
                size[:, 1:] * landmarks[:, 5:] + boxes[:, 1:2] - 1,
            ],
            dim=2,
        )
        boxes = _moved(boxes, regression)
        keep = _final_nms_per_frame(boxes, scores, frame_index, 0.7, integral.num_frames)
        return Detections(
            boxes=boxes[keep],
            probabilities=scores[keep],
            landmarks=points[keep],
            frame_index=frame_index[keep],
            num_frames=integral.num_frames,
            frame_size=integral.frame_size,
        )

    def _classify(self, name: str, integral: "IntegralImage", boxes: Tensor, frame_index: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of R-Net or O-Net on the crops of the candidates, in the order of `MTCNN_OUTPUTS`."""
        size = MTCNN_INPUT_SIZES[name]
        assert size is not None
        names = MTCNN_OUTPUTS[name]
        parts = []
        for part_boxes, part_frames in zip(boxes.split(_NETWORK_BATCH), frame_index.split(_NETWORK_BATCH), strict=True):
            outputs = self.networks[name](images=_normalized(_crops(integral, part_boxes, part_frames, size)))
            parts.append([outputs[key] for key in names])
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))


class IntegralImage(NamedTuple):
    """Sums of frame pixels: any rectangle of any frame is an exact sum of four entries, because pixels are integers.

    Attributes:
        sums: (N * (H + 1) * (W + 1), 4) int32 or int64; entry (n, y, x) is the sum of the red, green and blue pixels
            above y and left of x. The fourth value is unused; four values are loaded at once.
        num_frames: N.
        frame_size: (H, W).
    """

    sums: Tensor
    num_frames: int
    frame_size: tuple[int, int]


def _integral_image(frames: Tensor) -> IntegralImage:
    """Return the integral images of (N, 3, H, W) uint8 frames."""
    N, _, H, W = frames.shape
    dtype = torch.int32 if 255 * H * W < 2**31 else torch.int64
    sums = frames.new_zeros((N, H + 1, W + 1, 4), dtype=dtype)
    sums[:, 1:, 1:, :3] = frames.cumsum(3, dtype=dtype).cumsum(2, dtype=dtype).permute(0, 2, 3, 1)
    return IntegralImage(sums.flatten(0, 2), N, (H, W))


def _pixel_ranges(integral: IntegralImage, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (K,) int64 left, top (first pixel), right, bottom (first pixel beyond) inside the frame, rounded like
    facenet.
    """
    height, width = integral.frame_size
    left, top, right, bottom = boxes.trunc().long().unbind(1)
    return left.clamp(min=1) - 1, top.clamp(min=1) - 1, right.clamp(max=width), bottom.clamp(max=height)


def _inside(integral: IntegralImage, boxes: Tensor, frame_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the candidates that cover at least one pixel of their frame (facenet raises otherwise)."""
    left, top, right, bottom = _pixel_ranges(integral, boxes)
    covers = (right > left) & (bottom > top)
    return boxes[covers], frame_index[covers]


def _crops(integral: IntegralImage, boxes: Tensor, frame_index: Tensor, size: int) -> Tensor:
    """Return (K, 3, size, size) float32 crops of the boxes, channels last, equal to `F.interpolate(crop, size,
    mode="area")`.

    Area interpolation averages the pixels [floor(i * length / size), ceil((i + 1) * length / size)) of each axis.
    """
    left, top, right, bottom = _pixel_ranges(integral, boxes)
    cell = torch.arange(size, device=boxes.device)

    def cells(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        start, length = start[:, None], (stop - start)[:, None]
        return start + cell * length // size, start + ((cell + 1) * length + size - 1) // size

    x0, x1 = cells(left, right)
    y0, y1 = cells(top, bottom)
    height, width = integral.frame_size
    row = width + 1
    first = (frame_index * (height + 1) * row)[:, None]
    above, below = ((first + y * row)[:, :, None] for y in (y0, y1))

    def sums(line: Tensor, x: Tensor) -> Tensor:
        return integral.sums.index_select(0, (line + x[:, None, :]).flatten())

    total = sums(below, x1).sub_(sums(above, x1)).sub_(sums(below, x0)).add_(sums(above, x0))
    area = ((y1 - y0)[:, :, None] * (x1 - x0)[:, None, :]).reshape(-1, 1)
    pixels = total[:, :3].float() / area.float()
    return pixels.view(len(boxes), size, size, 3).permute(0, 3, 1, 2)


def _normalized(pixels: Tensor) -> Tensor:
    """Normalise pixels in 0–255 for the networks."""
    return (pixels - 127.5) * 0.0078125


def _squared(boxes: Tensor) -> Tensor:
    """Return the boxes enlarged to squares around their centres."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.amax(dim=1, keepdim=True)
    corner = boxes[:, :2] + size * 0.5 - side * 0.5
    return torch.cat([corner, corner + side], dim=1)


def _moved(boxes: Tensor, regression: Tensor) -> Tensor:
    """Return the boxes moved by a regression in units of their size; MTCNN includes both end pixels in sides."""
    size = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return boxes + regression * size


def _rows_per_frame(frame_index: Tensor, num_frames: int) -> tuple[Tensor, ...]:
    """Return, for each frame, the indices of its entries in their order."""
    order = frame_index.argsort(stable=True)
    return order.split(torch.bincount(frame_index, minlength=num_frames).tolist())


def _nms_per_frame(boxes: Tensor, scores: Tensor, frame_index: Tensor, threshold: float, num_frames: int) -> Tensor:
    """Return the indices that remain after non-maximum suppression, by frame and then by descending score.

    Frames are processed separately: `batched_nms` shifts the boxes of each frame apart, which rounds them, so that the
    result would depend on the frame's position in the batch.
    """
    kept = [rows[nms(boxes[rows], scores[rows], threshold)] for rows in _rows_per_frame(frame_index, num_frames)]
    return torch.cat(kept)


def _final_nms_per_frame(
    boxes: Tensor, scores: Tensor, frame_index: Tensor, threshold: float, num_frames: int
) -> Tensor:
    """Return the indices of the final faces, by frame and then by descending area; overlap is relative to the smaller
    box.
    """
    kept = [
        rows[_nms_over_smaller_box(boxes[rows], scores[rows], threshold)]
        for rows in _rows_per_frame(frame_index, num_frames)
    ]
    keep = torch.cat(kept)
    size = (boxes[keep, 2:] - boxes[keep, :2]).double()  # facenet compares areas in double precision
    by_area = size.prod(dim=1).argsort(stable=True).flip(0)
    return keep[by_area][frame_index[keep][by_area].argsort(stable=True)]


def _nms_over_smaller_box(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedily suppress boxes whose intersection exceeds a fraction of the smaller of the two.

    There are only a few boxes: computed on the CPU in numpy, whose sort orders equal scores as in facenet.
    """
    corners = boxes.cpu().numpy()
    area = (corners[:, 2] - corners[:, 0] + 1) * (corners[:, 3] - corners[:, 1] + 1)
    remaining = np.argsort(scores.cpu().numpy())
    picked = []
    while remaining.size:
        best, remaining = remaining[-1], remaining[:-1]
        picked.append(int(best))
        low = np.maximum(corners[best, :2], corners[remaining, :2])
        high = np.minimum(corners[best, 2:], corners[remaining, 2:])
        intersection = np.maximum(0.0, high - low + 1).prod(axis=1)
        remaining = remaining[intersection / np.minimum(area[best], area[remaining]) <= threshold]
    return torch.tensor(picked, dtype=torch.int64, device=boxes.device)
