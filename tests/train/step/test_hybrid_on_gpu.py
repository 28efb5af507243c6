"""A training step on an NVIDIA GPU with engines for the frozen stages, compared with the same step in PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frostline.export.exporter import export_stage
from frostline.models.checkpoints.loading import load_components
from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.device import full_fp32
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.step_settings import TrainingModuleSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(500),
    # All tests run in one process, which builds the engines once.
    pytest.mark.xdist_group("hybrid"),
]

# Compiling takes most of the time, so only the denoiser gets a second engine.
BACKENDS = ("onnxruntime", "aotinductor")


def build(plan: Any = "torch", engines: Path | None = None, checkpointing: str = "none") -> WanTrainingModule:
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": 8},
            "kl_weight": 0.1,
            "rewards": [{"type": "face_identity", "upscale": 2}],
            "gradient_checkpointing": checkpointing,
        }
    )
    components = load_components("tiny", torch.float32, "cuda")
    module = WanTrainingModule(components, settings, plan=plan, engines=engines, strict=engines is not None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> Path:
    root = tmp_path_factory.mktemp("engines")
    stages = build().stages
    for name in stages:
        assert export_stage(stages[name], "onnxruntime", EngineStore(root)).manifest.verified, name
    assert export_stage(stages["denoiser"], "aotinductor", EngineStore(root)).manifest.verified
    return root


def batch() -> dict[str, Any]:
    clips = held_out_clips(2, seed=1)
    return {"prompt": clips.prompts, "video": clips.video}


def step(module: WanTrainingModule) -> tuple[list[float], torch.Tensor]:
    """Return loss, face score and KL, and the gradient of the LoRA."""
    module.zero_grad()
    with full_fp32():
        outcome = module(batch())
        outcome[0].backward()
    assert all(value.device.type == "cuda" for value in outcome)
    gradient = torch.cat([p.grad.flatten() for p in module.trainable_parameters().values() if p.grad is not None])
    return [value.item() for value in outcome], gradient.double()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hybrid_step_is_a_step_in_torch(backend: str, engines: Path) -> None:
    module = build({**dict.fromkeys(build().stages, "onnxruntime"), "denoiser": backend}, engines)
    values, gradient = step(module)
    assert module.last_metrics is not None
    frozen = {name: time.backend for name, time in module.last_metrics.stages.items() if name in module.stages}
    assert frozen.pop("denoiser") == backend
    assert set(frozen.values()) == {"onnxruntime"}
    expected, wanted = step(build())
    assert values == pytest.approx(expected, abs=2e-3)
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.999
    assert abs(gradient.norm() / wanted.norm() - 1) < 1e-2


def test_the_plan_takes_only_what_is_faster_and_backends_swap(engines: Path) -> None:
    module = build("auto", engines)
    for name, choice in module.runtime.plan.items():
        times = choice.latency_ms
        assert choice.backend == "torch" or times[choice.backend] < times["torch"], name
    chosen = module.runtime.plan["denoiser"].backend
    planned, _ = step(module)
    swaps: Callable[..., Any] = module.runtime.use
    for backend in ("torch", *BACKENDS):
        with swaps(denoiser=backend):
            swapped, _ = step(module)
            assert module.last_metrics is not None
            assert module.last_metrics.stages["denoiser"].backend == backend
        assert swapped == pytest.approx(planned, abs=2e-3)
    assert chosen == build("auto", engines).runtime.plan["denoiser"].backend


@pytest.mark.parametrize("how", ["block", "full"])
def test_engines_compute_what_backward_recomputes(how: str, engines: Path) -> None:
    module = build("onnxruntime", engines, how)
    values, gradient = step(module)
    assert module.last_metrics is not None
    served = {name for name, time in module.last_metrics.stages.items() if time.backend == "onnxruntime"}
    assert "vae_decoder_live" in served
    assert ("denoise_tail" in served) == (how == "full")
    expected, wanted = step(build())
    assert values == pytest.approx(expected, abs=2e-3)
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.999
    assert abs(gradient.norm() / wanted.norm() - 1) < 1e-2


def test_recomputation_is_chosen_by_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(checkpointing="auto")
    step(module)
    assert module.gradient_checkpointing == "none", "a model of this size fits any GPU"
    monkeypatch.setattr("frostline.train.step.module.free_bytes", lambda device: 0)
    tight = build(checkpointing="auto")
    step(tight)
    assert tight.gradient_checkpointing != "none"


def test_engines_follow_an_optimizer(engines: Path) -> None:
    """Use the trainer's memory on the GPU: after each step, the engine computes the new policy."""
    module = build("auto", engines)
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-3)
    network = module.stages["denoiser"].networks[0]
    inputs = network.samples("opt")
    for _ in range(3):
        step(module)
        optimizer.step()
        with full_fp32():
            expected = network.reference(inputs)["velocity"]
            for backend in BACKENDS:
                with module.runtime.use(denoiser=backend):
                    actual = module.runtime["denoiser"](**inputs)["velocity"]
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
