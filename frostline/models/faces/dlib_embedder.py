"""dlib's face recognition network in PyTorch, differentiable with respect to the pixels.

Method: He et al. 2016, "Deep Residual Learning for Image Recognition", as King 2017 trained it with a metric loss on
about three million faces ("High Quality Face Recognition with Deep Metric Learning", dlib.net).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dlib_file import (
    BLOCKS,
    CHANNELS,
    EMBEDDING_DIM,
    IMAGE_SIZE,
    MEAN,
    STEM,
    Convolution,
    DlibWeights,
    read_dlib_weights,
)
from .networks import packaged_file

_PADDING = 0.25
# Points of dlib's mean face (`get_face_chip_details`), in units of its box: the corners of the eyes, left to right; tip
# of the nose; corners of the mouth.
_EYE_CORNERS = ((0.121737, 0.216423), (0.334606, 0.231733), (0.645647, 0.231733), (0.858516, 0.216423))
_NOSE, _MOUTH = (0.490127, 0.515625), ((0.254149, 0.780233), (0.726104, 0.780233))


def _template() -> Tensor:
    left, right = (torch.tensor(_EYE_CORNERS[k : k + 2], dtype=torch.float64).mean(dim=0) for k in (0, 2))
    others = torch.tensor([_NOSE, *_MOUTH], dtype=torch.float64)
    return (torch.stack([left, right, *others]) + _PADDING) / (1 + 2 * _PADDING) * IMAGE_SIZE


DLIB_TEMPLATE = _template()
"""(5, 2) x, y in a crop of 150 by 150 pixels: left eye, right eye, nose, left and right corner of the mouth.

dlib aligns by the corners of the eyes and the base of the nose. These are five other points of the same mean face in
the same crop; the centre of an eye is assumed to be the middle of its corners. dlib halves large faces before it crops
them; this implementation does not.
"""


class DlibNetwork(nn.Module):
    """The network alone: 29 convolutions in residual blocks of two.

    dlib's affine layers, which replace batch normalisation, and the normalisation of the pixels are folded into the
    weights of the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(STEM)
        self.blocks = nn.ModuleList(_Block(*block) for block in BLOCKS)
        self.projection = nn.Linear(CHANNELS, EMBEDDING_DIM, bias=False)

    def forward(self, faces: Tensor) -> Tensor:
        """Map (N, 3, 150, 150) RGB in [-1, 1] to (N, 128), dlib's vectors for comparison by Euclidean distance."""
        x = F.max_pool2d(self.stem(faces).relu(), 3, 2)
        for block in self.blocks:
            x = block(x)
        return self.projection(x.mean(dim=(2, 3)))

    @torch.no_grad()
    def load(self, weights: DlibWeights) -> None:
        """Load the content of a file."""
        convolutions = [self.stem, *(c for block in self.blocks for c in (block.first, block.second))]
        for number, (module, arrays) in enumerate(zip(convolutions, weights.convolutions, strict=True)):
            weight, bias, scale, shift = (torch.from_numpy(array).double() for array in arrays)
            if number == 0:  # this convolution has no padding, so a constant added to each pixel can be added after it
                mean = torch.tensor(MEAN, dtype=torch.float64)
                bias = bias + (weight.sum(dim=(2, 3)) * (127.5 - mean) / 256).sum(dim=1)
                weight = weight * (127.5 / 256)
            module.weight.copy_(weight * scale[:, None, None, None])
            module.bias.copy_(bias * scale + shift)
        self.projection.weight.copy_(torch.from_numpy(weights.projection).T)


class DlibEmbedder(nn.Module):
    """dlib's `face_recognition_model_v1`: maps 150×150 faces to 128-dimensional embeddings, here normalised.

    dlib considers two faces the same person if its vectors are less than 0.6 apart. Their length is always about 1.4,
    so cosine similarities rank pairs almost like distances; 0.6 corresponds to a cosine of about 0.91. Two different
    people have a cosine of about 0.85.

    Args:
        path: the file `dlib_face_recognition_resnet_model_v1.dat`; by default the one in the wheel
            face-recognition-models (CC0-1.0).
    Raises:
        ConfigError: the file is missing or contains something else.
    """

    license = "CC0-1.0"
    image_size = IMAGE_SIZE
    embedding_dim = EMBEDDING_DIM
    template = DLIB_TEMPLATE

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.name = "dlib"
        self.network = DlibNetwork()
        self.network.load(read_dlib_weights(Path(path) if path is not None else dlib_path()))
        self.eval().requires_grad_(False)

    def forward(self, faces: Tensor) -> Tensor:
        """Map (N, 3, 150, 150) RGB in [-1, 1] to (N, 128) with unit norm."""
        return F.normalize(self.network(faces), dim=1)


def dlib_path() -> Path:
    """Return the weights file in the installed wheel of face-recognition-models.

    Raises:
        ConfigError: the wheel is not installed or lacks the file.
    """
    return packaged_file(
        "face_recognition_models",
        "models/dlib_face_recognition_resnet_model_v1.dat",
        "face-recognition-models, which is not installed: pip install 'frostline[dlib]'",
    )


class _Block(nn.Module):
    """Two convolutions with a skip connection: the identity, or 2×2 means if the first convolution has a stride."""

    def __init__(self, first: Convolution, second: Convolution) -> None:
        super().__init__()
        self.first, self.second = _convolution(first), _convolution(second)
        self.down = first.stride > 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x).relu())
        return (_add(out, F.avg_pool2d(x, 2)) if self.down else out + x).relu()


def _convolution(shape: Convolution) -> nn.Conv2d:
    return nn.Conv2d(shape.channels_in, shape.channels_out, shape.kernel, shape.stride, shape.padding)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of tensors (N, C, H, W); the smaller one in a dimension is padded with zeros at its end."""
    size = [max(own, other) for own, other in zip(a.shape[1:], b.shape[1:], strict=True)]
    a, b = (
        F.pad(x, [pad for own, full in zip(x.shape[:0:-1], size[::-1], strict=True) for pad in (0, full - own)])
        for x in (a, b)
    )
    return a + b
