"""Load the rewards of a scoring run on the requested backend, and build missing engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from frostline.config import AUTO
from frostline.errors import ConfigError
from frostline.export.exporter import ensure_verified, export_stage
from frostline.rewards.active import ActiveReward
from frostline.rewards.build import build_rewards
from frostline.rewards.face_identity.reward import FaceIdentityReward
from frostline.rewards.frame_reward import FrameReward
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Stage
from frostline.score.rewards.base import ScoredReward
from frostline.score.rewards.clips import ClipReward
from frostline.score.rewards.faces import FaceReward
from frostline.score.rewards.features import FeatureReward
from frostline.score.settings import ScoreSettings
from frostline.stages.shapes import ShapeRange


def check_backend(backend: str) -> None:
    """Check that a backend is available, before networks are loaded.

    Raises:
        ConfigError: the backend is unknown, or not installed.
    """
    if backend not in (AUTO, TORCH) and (reason := get_backend(backend).unavailable()):
        raise ConfigError(f"backend {backend}: {reason}")


def load_rewards(
    settings: ScoreSettings,
    backend: str,
    engines: Path,
    device: torch.device,
    batch: int,
    announce: Callable[[str], None] = lambda step: None,
) -> tuple[ScoredReward, ...]:
    """Load the rewards of `settings`, each with a separate runtime, because their stages can have the same names.

    Args:
        settings: the settings of the run.
        backend: `auto` for the fastest of PyTorch and the verified engines in `engines`, for each stage; `torch`; or
            the name of a backend, whose missing engines are built.
        engines: the folder of the engine store.
        device: the device of the networks.
        batch: the number of frames per call of a reward's networks.
        announce: called with a description of each engine that is built.
    Raises:
        ConfigError: a reward, its networks or the backend is not available, or two rewards have the same name.
        EngineError: an engine cannot be built, or its outputs differ from PyTorch's.
    """
    check_backend(backend)
    store, scored = EngineStore(engines), []
    actives = build_rewards(settings.entries, device, ShapeRange())
    for label, active in zip(settings.labels(), actives, strict=True):
        _provide_engines(active.stages, backend, store, announce)
        runtime = Runtime({stage.name: stage for stage in active.stages}, backend, engines)
        scored.append(_kind_of(active)(label, active, runtime, device, batch))
    return tuple(scored)


def _provide_engines(
    stages: Iterable[Stage], backend: str, store: EngineStore, announce: Callable[[str], None]
) -> None:
    if backend == AUTO:
        ensure_verified(stages, store)
    elif backend != TORCH:
        for stage in stages:
            start = f"{backend} {stage.name}"
            announce(start)
            export_stage(stage, backend, store, progress=lambda step, start=start: announce(f"{start}: {step}"))


def _kind_of(active: ActiveReward) -> type[FaceReward | FeatureReward | ClipReward]:
    if isinstance(active.reward, FaceIdentityReward):
        return FaceReward
    return FeatureReward if isinstance(active.reward, FrameReward) else ClipReward
