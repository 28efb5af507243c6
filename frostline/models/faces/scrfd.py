"""SCRFD face detection for batches of frames, from ONNX files in the layout of insightface's `scrfd_10g_bnkps`.

Method: Guo et al. 2021, "Sample and Computation Redistribution for Efficient Face Detection". The layout: nine outputs
(scores, then boxes, then landmarks), each for the strides 8, 16 and 32, with two anchors per cell.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.onnx.module import OnnxGraph

from .dense import STRIDES, Candidates, cell_places, detect_in_parts, gather_strides, padded
from .detections import Detections
from .networks import Network

SCRFD_OUTPUTS = tuple(f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES)
"""Names of the outputs of `ScrfdNetwork`, in order. Shapes: (N, anchors) for `score`, (N, anchors, 4) for `bbox`, and
(N, anchors, 10) for `kps`.
"""

SCRFD_SIDE = 640
"""Longest side in pixels of the frames in insightface."""

ANCHORS = 2
_CHANNELS = (1, 4, 10)


class ScrfdNetwork(nn.Module):
    """An SCRFD file with the interface of engines.

    `forward(images)` takes (N, 3, H, W) float32 RGB pixels scaled by `(x - 127.5) / 128`, H and W multiples of 32, and
    returns the outputs in `SCRFD_OUTPUTS`: the probability of a face, and the distances to the sides of its box and to
    its landmarks, in strides.

    Args:
        path: the .onnx file. Its outputs may have a batch dimension, or a batch dimension merged with the anchors.
    Raises:
        ConfigError: the file is missing or has another layout.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.network = OnnxGraph(path)
        self._check()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `SCRFD_OUTPUTS`."""
        count = images.shape[0]
        outputs = self.network(images)
        shaped = [output.reshape(count, -1, _CHANNELS[index // len(STRIDES)]) for index, output in enumerate(outputs)]
        return (*(scores[..., 0] for scores in shaped[:3]), *shaped[3:])

    @torch.no_grad()
    def _check(self) -> None:
        """Process two frames, which shows the layout and that the file supports batches."""
        path, names = self.network.path, self.network.output_names
        if len(names) != len(SCRFD_OUTPUTS):
            raise ConfigError(f"{path} has {len(names)} outputs; an SCRFD file with landmarks has nine")
        height, width = 64, 96
        try:
            outputs = self(torch.zeros(2, 3, height, width))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{path} cannot process frames of {width} by {height}: {error}") from error
        for name, stride, output in zip(SCRFD_OUTPUTS, STRIDES * 3, outputs, strict=True):
            expected = height * width // stride**2 * ANCHORS
            if output.shape[:2] != (2, expected):
                raise ConfigError(f"{path}: its {name} has shape {tuple(output.shape)}, not (2, {expected}, …)")


class Scrfd:
    """Detect faces with an `ScrfdNetwork`, on any backend.

    Args:
        network: takes `images=` and returns tensors by the names in `SCRFD_OUTPUTS`.
        score_threshold: minimum probability.
        overlap: IoU above which the face with the lower score is removed. Both defaults are insightface's.
        longest_side: larger frames are shrunk to this many pixels, as in insightface.
    """

    def __init__(
        self, network: Network, score_threshold: float = 0.5, overlap: float = 0.4, longest_side: int = SCRFD_SIDE
    ) -> None:
        self.network = network
        self.score_threshold = score_threshold
        self.overlap = overlap
        self.longest_side = longest_side

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Detect faces in (N, 3, H, W) uint8 RGB frames, enlarged `upscale` times; the result is in pixels of the
        frames.

        The result for a frame does not depend on the other frames; N may be 0.
        """
        return detect_in_parts(frames, upscale, self._find, self.overlap)

    def _find(self, frames: Tensor) -> Candidates:
        images, scale = self._as_input(frames)
        outputs = self.network(images=images)
        width = images.shape[-1]

        def pick(stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            scores = outputs[f"score_{stride}"]
            frame_index, anchors = torch.nonzero(scores >= self.score_threshold, as_tuple=True)
            centre = cell_places(anchors, width, ANCHORS, stride)
            sides = outputs[f"bbox_{stride}"][frame_index, anchors] * stride
            boxes = torch.cat([centre - sides[:, :2], centre + sides[:, 2:]], dim=1)
            points = outputs[f"kps_{stride}"][frame_index, anchors].unflatten(1, (5, 2)) * stride + centre[:, None]
            return boxes / scale, scores[frame_index, anchors], points / scale, frame_index

        boxes, scores, landmarks, frame_index = gather_strides(pick)
        # insightface includes both end pixels.
        rivals = torch.cat([boxes[:, :2], boxes[:, 2:] + 1], dim=1)
        return Candidates(boxes, scores, landmarks, frame_index, rivals)

    def _as_input(self, frames: Tensor) -> tuple[Tensor, float]:
        """Return (N, 3, H, W) uint8 frames as network input, padded with black, and the factor by which they were
        shrunk.
        """
        height, width = frames.shape[-2:]
        pixels, scale = frames.float(), 1.0
        if max(height, width) > self.longest_side:
            longest, scale = max(height, width), self.longest_side / max(height, width)
            height, width = (max(1, side * self.longest_side // longest) for side in (height, width))
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round()
        bottom, right = (side - own for side, own in zip(padded(height, width), (height, width), strict=True))
        return (F.pad(pixels, (0, right, 0, bottom)) - 127.5) / 128, scale
