"""Face detectors by setting: the networks of each, and how to create a detector from functions that run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from frostline.errors import ConfigError

from .dense import MULTIPLE
from .detections import FaceDetector
from .mtcnn import BatchedMTCNN
from .mtcnn_networks import MTCNN_INPUT_SIZES, MTCNN_OUTPUTS, load_mtcnn_networks
from .networks import Network, as_network
from .scrfd import SCRFD_OUTPUTS, SCRFD_SIDE, Scrfd, ScrfdNetwork
from .yunet import YUNET_OUTPUTS, YuNet, YuNetNetwork


@dataclass(frozen=True)
class DetectorNetwork:
    """A network of a detector: a module that takes `images` (N, 3, H, W) float32 and returns a tuple.

    Attributes:
        outputs: names of the outputs.
        side: side of its square input; None if any multiple of `multiple` is supported.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    side: int | None = None
    multiple: int = 1


@dataclass(frozen=True)
class DetectorModel:
    """A detector that is independent of where its networks run.

    Attributes:
        name: name in reports and in the engine store.
        make: creates a detector from functions that run its networks, by name.
        license: SPDX identifier of the weights' licence; None if unknown.
    """

    name: str
    networks: Mapping[str, DetectorNetwork]
    make: Callable[[Mapping[str, Network]], FaceDetector]
    license: str | None = None

    def modules(self) -> nn.ModuleDict:
        """Return the networks' modules by name, to move them to a device."""
        return nn.ModuleDict({name: network.module for name, network in self.networks.items()})

    def in_torch(self) -> FaceDetector:
        """Return the detector, which runs its networks in PyTorch."""
        return self.make({name: as_network(n.module, n.outputs) for name, n in self.networks.items()})


def load_detector(spec: str, min_face_size: int = 20, detection_size: int | None = None) -> DetectorModel:
    """Return a detector by its setting: `mtcnn`, `yunet` or `scrfd:PATH.onnx`.

    Args:
        min_face_size: side in pixels of the smallest face that MTCNN searches for; the other detectors ignore it.
        detection_size: longest side in pixels to which the caller resizes frames before detection; None without
            resizing. SCRFD, which shrinks frames of more than 640 pixels, does not shrink resized frames further.
    Raises:
        ConfigError: there is no such detector, or its weights are not available.
    """
    kind, _, argument = spec.partition(":")
    if spec == "mtcnn":
        return mtcnn_model(load_mtcnn_networks(), min_face_size=min_face_size)
    if spec == "yunet":
        return _single("yunet", YuNetNetwork(), YUNET_OUTPUTS, YuNet, "MIT")
    if kind == "scrfd" and argument:
        return _single(
            f"scrfd-{Path(argument).stem}",
            ScrfdNetwork(argument),
            SCRFD_OUTPUTS,
            partial(Scrfd, longest_side=max(SCRFD_SIDE, detection_size or 0)),
        )
    raise ConfigError(f"unknown face detector {spec!r}: use mtcnn, yunet or scrfd:PATH.onnx")


def mtcnn_model(modules: Mapping[str, nn.Module], **settings: Any) -> DetectorModel:
    """Return MTCNN with these networks; `settings` are the arguments of `BatchedMTCNN`."""
    networks = {
        name: DetectorNetwork(module, MTCNN_OUTPUTS[name], MTCNN_INPUT_SIZES[name]) for name, module in modules.items()
    }
    return DetectorModel("mtcnn", networks, lambda running: BatchedMTCNN(running, **settings), "MIT")


def _single(
    name: str,
    module: nn.Module,
    outputs: tuple[str, ...],
    detector: Callable[[Network], FaceDetector],
    license: str | None = None,
) -> DetectorModel:
    """Return a detector with one fully convolutional network."""
    network = DetectorNetwork(module.eval().requires_grad_(False), outputs, multiple=MULTIPLE)
    key = name.partition("-")[0]
    return DetectorModel(name, {key: network}, lambda running: detector(running[key]), license)
