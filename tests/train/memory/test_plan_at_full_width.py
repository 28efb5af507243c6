"""The memory plan compared with the allocations of a whole training step at the width of Wan2.1-T2V-1.3B.

This takes some GB and minutes, so it only runs with FROSTLINE_BIG_TESTS=1: with 3 of the 30 blocks (2 GB), or with
FROSTLINE_BIG_BLOCKS blocks.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from frostline.config import CHECKPOINTING
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import RELEASED
from frostline.models.video_shape import VideoShape
from frostline.models.wan.networks import build_network
from frostline.train import WanTrainingModule
from frostline.train.memory.measurements import Measurements
from frostline.train.memory.plan import memory_plan
from frostline.train.step_settings import TrainingModuleSettings

RELEASE = "Wan2.1-T2V-1.3B"
BLOCKS = int(os.environ.get("FROSTLINE_BIG_BLOCKS", "3"))
SHAPE = VideoShape(batch_size=1, num_frames=9, height=64, width=64)


def components_of_full_width() -> Any:
    """Return denoiser and VAE in the sizes of the release with random weights, and tiny's text encoder."""
    tiny = load_components("tiny")
    text_dim = tiny.spec.networks["denoiser"]["text_dim"]
    denoiser = {**RELEASED[RELEASE]["denoiser"], "num_layers": BLOCKS, "text_dim": text_dim}
    networks = {**tiny.spec.networks, "denoiser": denoiser, "vae": RELEASED[RELEASE]["vae"]}
    torch.manual_seed(0)
    made: dict[str, Any] = {name: build_network(name, networks[name]) for name in ("denoiser", "vae")}
    for network in made.values():
        network.to_empty(device="cpu").eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    return replace(tiny, spec=replace(tiny.spec, name="full width", networks=networks), weights={}, **made)


def allocated_by(step: Any) -> int:
    """Return the maximum number of bytes that PyTorch's CPU allocator held in a step in addition to those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events: Any = profiled.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.skipif(os.environ.get("FROSTLINE_BIG_TESTS") != "1", reason="set FROSTLINE_BIG_TESTS=1: takes some GB")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_the_peak_of_a_step_is_as_planned(kind: Any) -> None:
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": 32},
            "gradient_checkpointing": kind,
            "rewards": [{"type": "sharpness"}],
            "cache_bytes": 0,
            **{"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2},
        }
    )
    components = components_of_full_width()
    module = WanTrainingModule(components, settings, plan="torch", engines=None)
    parameters = module.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, foreach=False)
    data = {"prompt": ["a person nods"], "video": torch.rand(1, SHAPE.num_frames, 3, SHAPE.height, SHAPE.width)}

    def step() -> None:
        module(data)[0].backward()

    step()
    optimizer.step()  # gradients and moments exist from now on, as in the plan
    held = sum(tensor.nbytes for part in module.model.modules() for tensor in part.parameters())
    held += 3 * sum(parameter.nbytes for parameter in parameters.values())
    measurements = Measurements("tiny")
    measurements.spec = components.spec
    plan = memory_plan(
        "tiny",
        settings,
        SHAPE,
        dtype=torch.float32,
        rewards=[each.reward for each in module.rewards],
        measurements=measurements,
    )
    assert plan.resident == held
    assert held + allocated_by(step) == pytest.approx(plan.peak, rel=0.05)
    assert max(plan.peaks.values()) > 0.2 * plan.resident, "the step itself must be a visible part of the plan"
