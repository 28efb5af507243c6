"""Fixtures: Wan's two VAEs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffsynth.models.wan_video_vae import VideoVAE38_

from frostline.models.checkpoints.loading import load_components


@pytest.fixture(scope="module")
def vae() -> Any:
    """Return the VAE of the tiny model."""
    return load_components("tiny").vae


@pytest.fixture(scope="module")
def vae38() -> Any:
    """Return a small VAE of Wan2.2 TI2V with random weights."""
    torch.manual_seed(0)
    model = VideoVAE38_(dim=8, z_dim=8, dec_dim=8, num_res_blocks=1).eval().requires_grad_(False)
    return SimpleNamespace(model=model, scale=[torch.randn(8), 1 + torch.rand(8)])
