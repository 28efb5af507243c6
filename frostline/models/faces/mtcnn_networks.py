"""The three networks of MTCNN (arXiv 1604.02878), with the weights in the facenet-pytorch wheel.

Layers and names are those of `facenet_pytorch.models.mtcnn`, so that its files can be loaded. The package itself is not
imported: it imports all of torchvision, which takes longer than importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.package_info import package_folder

MTCNN_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "pnet": ("regression", "probability"),
    "rnet": ("regression", "probability"),
    "onet": ("regression", "landmarks", "probability"),
}
"""Output names of each network, in the order of its return values."""

MTCNN_INPUT_SIZES: Mapping[str, int | None] = {"pnet": None, "rnet": 24, "onet": 48}
"""Side in pixels of each network's square input; P-Net is fully convolutional and supports any size from 12."""


def load_mtcnn_networks() -> dict[str, nn.Module]:
    """Return `pnet`, `rnet` and `onet`, frozen.

    They take (N, 3, H, W) float32 RGB pixels scaled by `(x - 127.5) / 128` and return, in this order:

    - pnet: regression (N, 4, h, w), probability (N, h, w)
    - rnet: regression (N, 4), probability (N,)
    - onet: regression (N, 4), landmarks (N, 10) as five x then five y, probability (N,)

    Probabilities are those of the class "face".

    Raises:
        ConfigError: facenet-pytorch is not installed.
    """
    folder = package_folder("facenet_pytorch")
    if folder is None:
        raise ConfigError("MTCNN's weights are in facenet-pytorch, which is not installed: pip install facenet-pytorch")
    networks: dict[str, nn.Module] = {"pnet": _PNet(), "rnet": _RNet(), "onet": _ONet()}
    for name, network in networks.items():
        network.load_state_dict(torch.load(folder / "data" / f"{name}.pt", "cpu", weights_only=True))
        # In channels-last layout, max pooling is 2 to 4 times as fast on CPUs.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.eval().requires_grad_(False)
    return networks


class _PNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.prelu2(self.conv2(x))
        x = self.prelu3(self.conv3(x))
        return self.conv4_2(x), _face_probability(self.conv4_1(x))


class _RNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return self.dense5_2(x), _face_probability(self.dense5_1(x))


class _ONet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        return self.dense6_2(x), self.dense6_3(x), _face_probability(self.dense6_1(x))


def _flatten(x: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N, W * H * C): the weights use the layout of Caffe's Matlab interface."""
    return x.permute(0, 3, 2, 1).flatten(1)


def _face_probability(scores: Tensor) -> Tensor:
    """Return the probability of the second of two classes in dimension 1."""
    return scores.softmax(dim=1)[:, 1]
