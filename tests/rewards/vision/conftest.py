"""Fixtures of the tests of vision rewards: their files, each reward alone, a clip of moving patterns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vision_files import write_aesthetic, write_clip, write_dinov2, write_hpsv2

from frostline.rewards.active import ActiveReward
from frostline.rewards.build import build_rewards
from frostline.rewards.config import RewardEntry
from frostline.runtime.runtime import Runtime
from frostline.stages.shapes import ShapeRange

Build = Callable[..., tuple[ActiveReward, Runtime]]


@pytest.fixture(scope="session")
def vision_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Write the files; return the entries of rewards by type, and under `models` the models that were written."""
    root = tmp_path_factory.mktemp("vision")
    models = {
        "clip": write_clip(root / "clip"),
        "pickscore": write_clip(root / "pickscore", seed=1),
        "hpsv2": write_hpsv2(root / "hpsv2" / "HPS_v2.1_compressed.pt", seed=2),
        "aesthetic": write_aesthetic(root / "aesthetic.pth"),
        "subject_consistency": write_dinov2(root / "dinov2"),
    }
    entries: dict[str, dict[str, Any]] = {
        "clip": {"weights": root / "clip"},
        "pickscore": {"weights": root / "pickscore"},
        "hpsv2": {"weights": root / "hpsv2" / "HPS_v2.1_compressed.pt"},
        "aesthetic": {"weights": root / "clip", "predictor": root / "aesthetic.pth"},
        "subject_consistency": {"weights": root / "dinov2"},
    }
    texts = {name: {"type": name, **_as_text(entry)} for name, entry in entries.items()}
    return {**texts, "models": models}


def _as_text(entry: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in entry.items()}


@pytest.fixture(scope="session")
def build_alone(vision_files: dict[str, dict[str, Any]]) -> Build:
    """`build_alone("clip", **settings)`: return the reward, and a runtime with its stages in PyTorch."""

    def build(name: str, **settings: Any) -> tuple[ActiveReward, Runtime]:
        (active,) = build_rewards([RewardEntry.parse({**vision_files[name], **settings})], "cpu", ShapeRange())
        return active, Runtime({stage.name: stage for stage in active.stages}, "torch")

    return build


@pytest.fixture
def video() -> Tensor:
    """Return a smooth video of 8-bit values, (2, 5, 3, 40, 52)."""
    frames = F.interpolate(torch.rand(10, 3, 6, 6), (40, 52), mode="bicubic").clamp(0, 1)
    return ((frames * 255).round() / 255).unflatten(0, (2, 5))
