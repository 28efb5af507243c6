"""The networks of a scoring run on the backend that it asked for, whose engines are built where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from frostline.config import AUTO
from frostline.errors import ConfigError
from frostline.export.exporter import ensure_verified, export_stage
from frostline.models.faces.embedders import FaceEmbedder
from frostline.models.faces.identity import FaceIdentity
from frostline.rewards.face_identity.served import ServedDetector, ServedEmbedder
from frostline.rewards.face_identity.stages import build_face_stages, load_faces
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import Runtime
from frostline.score.settings import ScoreSettings
from frostline.stages.shapes import ShapeRange


@dataclass(frozen=True)
class FaceNetworks:
    """Detector and embedder, served by `runtime` from its engines or PyTorch. names: of the two."""

    identity: FaceIdentity
    runtime: Runtime
    names: tuple[str, str]
    device: torch.device

    def backends(self) -> tuple[str, str]:
        """What serves `face_detector` and `face_embedder` now."""
        return self.runtime.plan["face_detector"].backend, self.runtime.plan["face_embedder"].backend


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot serve here before anything is loaded.

    Raises:
        ConfigError: it is unknown, or not installed.
    """
    if backend not in (AUTO, TORCH) and (reason := get_backend(backend).unavailable()):
        raise ConfigError(f"backend {backend}: {reason}")


def load_networks(
    settings: ScoreSettings,
    backend: str,
    engines: Path,
    device: torch.device,
    announce: Callable[[str], None] = lambda step: None,
) -> FaceNetworks:
    """The networks of `settings`.

    Args:
        backend: `auto` takes, per stage, the fastest verified engine that `engines` has and PyTorch where none is
            faster; `torch`; or the backend of an engine, which is built if it is not there.
        announce: told what is being built.
    Raises:
        ConfigError: detector, embedder or backend cannot be had.
        EngineError: an engine cannot be built, or does not compute what PyTorch computes.
    """
    check_backend(backend)
    faces = load_faces(settings.detector, settings.embedder, settings.min_face_size)
    faces.detector.modules().to(device)
    embedder = cast(FaceEmbedder, faces.embedder.to(device))
    stages = {stage.name: stage for stage in build_face_stages(faces, ShapeRange())}
    store = EngineStore(engines)
    if backend == AUTO:
        ensure_verified(stages.values(), store)
    elif backend != TORCH:
        for name, stage in stages.items():
            announce(f"{backend} {name}")
            export_stage(stage, backend, store, progress=lambda step, name=name: announce(f"{backend} {name}: {step}"))
    runtime = Runtime(stages, backend, engines)
    served = ServedEmbedder.of(embedder, runtime)
    identity = FaceIdentity(ServedDetector(runtime), served, settings.upscale, settings.missing_face, settings.face)
    return FaceNetworks(identity, runtime, (faces.detector.name, embedder.name), device)
