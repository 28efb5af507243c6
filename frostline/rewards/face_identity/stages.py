"""The face networks and their stages, `face_detector` and `face_embedder`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from frostline.models.faces.detectors import DetectorModel, load_detector
from frostline.models.faces.embedders import Channels, load_embedder
from frostline.rewards.face_identity import detector as face_detector
from frostline.rewards.face_identity import embedder as face_embedder
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange


@dataclass(frozen=True)
class FaceModels:
    """The networks.

    Attributes:
        embedder: the return value of `load_embedder`.
    """

    detector: DetectorModel
    embedder: nn.Module

    @property
    def device(self) -> torch.device:
        """Return the device of the networks."""
        return next(itertools.chain(self.embedder.parameters(), self.embedder.buffers())).device


def load_faces(
    detector: str, embedder: str, min_face_size: int, detection_size: int | None = None, channels: Channels = "rgb"
) -> FaceModels:
    """Load the networks for these settings.

    Raises:
        ConfigError: there is no such network, or its weights are missing.
    """
    loaded = load_embedder(embedder, channels)
    assert isinstance(loaded, nn.Module)
    return FaceModels(load_detector(detector, min_face_size, detection_size), loaded)


def build_face_stages(faces: FaceModels, shapes: ShapeRange) -> tuple[Stage, Stage]:
    """Return both stages; they need no video model."""
    return face_detector.build(faces.detector, shapes), face_embedder.build(faces.embedder, shapes)
