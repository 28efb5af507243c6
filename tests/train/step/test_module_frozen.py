"""A step with frozen results from engines or from the cache equals the step in PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from steps import QUICK, assert_same_steps, clips, row, small_clips

from frostline.stages.denoiser import REFERENCE
from frostline.train import WanTrainingModule

if TYPE_CHECKING:
    from conftest import RewardTape

MakeModule = Callable[..., WanTrainingModule]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_with_engines_equals_a_step_in_torch(
    count: int, make_module: MakeModule, engines: Path, tape: "RewardTape"
) -> None:
    in_torch, hybrid = make_module(), make_module(plan="onnxruntime", engines=engines)
    assert {choice.backend for choice in hybrid.runtime.plan.values()} == {"onnxruntime"}
    assert_same_steps(in_torch, hybrid, clips(count, seed=count, num_frames=9 if count == 1 else 5), tape)
    assert in_torch.last_metrics is not None
    assert hybrid.last_metrics is not None
    assert max(hybrid.last_metrics.per_sample["detection_rate"]) > 0, "no reward was compared"
    assert hybrid.last_metrics.stages["denoiser"].backend == "onnxruntime"
    assert in_torch.last_metrics.stages["denoiser"].backend == "torch"


@pytest.mark.parametrize("model", ["tiny-moe", "tiny-ti2v"])
def test_the_variants_step_with_engines_as_in_torch(
    model: str, make_module: MakeModule, variant_engines: Path, tape: "RewardTape"
) -> None:
    in_torch, hybrid = make_module(model), make_module(model, plan="onnxruntime", engines=variant_engines)
    assert {choice.backend for choice in hybrid.runtime.plan.values()} == {"onnxruntime"}
    assert_same_steps(in_torch, hybrid, clips(1, seed=7, num_frames=5), tape)


@pytest.mark.parametrize(
    ("model", "how", "engines_serve"),
    [
        ("tiny", "block", {"vae_decoder_live"}),
        ("tiny", "full", {"vae_decoder_live", "denoise_tail"}),
        ("tiny-moe", "full", {"vae_decoder_live", "denoise_tail"}),
        ("tiny-ti2v", "full", {"vae_decoder_live", "denoise_tail"}),
    ],
)
def test_engines_compute_what_backward_recomputes(
    model: str, how: str, engines_serve: set[str], make_module: MakeModule, variant_engines: Path, tape: "RewardTape"
) -> None:
    in_torch = make_module(model)
    hybrid = make_module(model, plan="onnxruntime", engines=variant_engines, gradient_checkpointing=how)
    assert_same_steps(in_torch, hybrid, clips(1, seed=7, num_frames=5), tape)
    assert hybrid.last_metrics is not None
    stages = hybrid.last_metrics.stages
    live = {name: stages[name].backend for name in ("vae_decoder_live", "denoise_tail")}
    assert {name for name, backend in live.items() if backend == "onnxruntime"} == engines_serve


def test_engines_leave_the_live_part_alone_if_told_so(make_module: MakeModule, engines: Path) -> None:
    asked = {"plan": "onnxruntime", "engines": engines, "gradient_checkpointing": "full", **QUICK}
    module = make_module(engine_forward=False, **asked)
    module(small_clips(1))
    assert module.last_metrics is not None
    stages = module.last_metrics.stages
    assert (stages["denoise_tail"].backend, stages["vae_decoder_live"].backend) == ("torch", "torch")
    assert stages["denoiser"].backend == "onnxruntime"


def test_the_kl_of_a_new_lora_is_zero_with_engines(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines, lora_spread=0)
    _, _, kl_loss = module(small_clips(2))
    assert 0 <= kl_loss.item() <= 1e-10
    assert module.last_metrics is not None
    assert len(module.last_metrics.kl) == 4
    assert max(module.last_metrics.kl.values()) <= 1e-10


def test_an_engine_follows_the_policy_after_an_optimizer_step(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines, **QUICK)
    files = {path: path.stat().st_mtime_ns for path in engines.rglob("*") if path.is_file()}
    stage = module.stages["denoiser"]
    inputs = stage.cases()["sample"].inputs
    before, base_before = (
        module.runtime["denoiser"](**inputs),
        module.runtime.run("denoiser", inputs, variant=REFERENCE),
    )
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-2)
    loss, _, _ = module(small_clips(1))
    loss.backward()
    optimizer.step()
    after = module.runtime["denoiser"](**inputs)["velocity"]
    assert (after - before["velocity"]).norm() > 0.01 * before["velocity"].norm()
    with torch.no_grad():
        torch.testing.assert_close(after, stage.torch(inputs)["velocity"], atol=1e-5, rtol=0)
    base = module.runtime.run("denoiser", inputs, variant=REFERENCE)
    torch.testing.assert_close(base, base_before, atol=0, rtol=0)
    assert module.runtime.plan["denoiser"].backend == "onnxruntime"
    assert {path: path.stat().st_mtime_ns for path in engines.rglob("*") if path.is_file()} == files


def test_a_step_on_engines_with_default_settings(engines: Path, make_module: MakeModule) -> None:
    """Use 16 frames of 256×256 noise, engines for all stages, and default settings."""
    module = WanTrainingModule.from_pretrained("tiny", engines=engines, plan="onnxruntime", strict=True)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 16, 3, 256, 256, generator=generator)
    loss, face_score, kl_loss = module.forward({"prompt": ["a person talking"], "video": video})
    assert [value.shape for value in (loss, face_score, kl_loss)] == [()] * 3
    assert torch.stack([loss.detach(), face_score, kl_loss]).isfinite().all()
    assert loss.requires_grad
    assert {choice.backend for choice in module.runtime.plan.values()} == {"onnxruntime"}


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-ti2v"])
def test_a_cached_step_is_the_uncached_one(model: str, make_module: MakeModule, tmp_path: Path) -> None:
    data = small_clips(2)
    uncached = make_module(model, cache_bytes=0, **QUICK)
    cached = make_module(model, cache_dir=tmp_path, **QUICK)
    expected = uncached(data)
    assert uncached.parts.cache is None
    assert cached.parts.cache is not None
    assert [torch.equal(one, other) for one, other in zip(expected, cached(data), strict=True)] == [True] * 3
    # Context, image latents and references of two samples; with two experts, also the latents of the first expert.
    entries = 8 if model == "tiny-moe" else 6
    assert (cached.parts.cache.hits, cached.parts.cache.misses) == (0, entries)
    assert [torch.equal(one, other) for one, other in zip(expected, cached(data), strict=True)] == [True] * 3
    assert (cached.parts.cache.hits, cached.parts.cache.misses) == (entries, entries)
    assert len(list(tmp_path.glob("*.safetensors"))) == entries


def test_another_process_finds_the_cache_and_recomputes_what_is_damaged(
    make_module: MakeModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_clips(1)
    expected = make_module(cache_dir=tmp_path, **QUICK)(data)
    again = make_module(cache_dir=tmp_path, **QUICK)
    assert [torch.equal(one, other) for one, other in zip(expected, again(data), strict=True)] == [True] * 3
    assert again.parts.cache is not None
    assert (again.parts.cache.hits, again.parts.cache.misses) == (3, 0)
    for path in tmp_path.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    damaged = make_module(cache_dir=tmp_path, **QUICK)
    assert [torch.equal(one, other) for one, other in zip(expected, damaged(data), strict=True)] == [True] * 3
    assert damaged.parts.cache is not None
    assert (damaged.parts.cache.corrupted, damaged.parts.cache.hits) == (3, 0)
    assert caplog.text.count("is damaged") == 3
    repaired = make_module(cache_dir=tmp_path, **QUICK)
    repaired(data)
    assert repaired.parts.cache is not None
    assert (repaired.parts.cache.corrupted, repaired.parts.cache.hits) == (0, 3)


def test_cached_conditions_are_not_shared_between_different_inputs(make_module: MakeModule) -> None:
    module = make_module(**QUICK)
    data = small_clips(2)
    both = module.forward_preprocess(data)
    alone = module.forward_preprocess(row(data, 1))
    assert module.parts.cache is not None
    assert module.parts.cache.hits == 3
    latents = both.conditions["y"]
    assert torch.equal(alone.conditions["y"][0], latents[1])
    assert not torch.equal(latents[0], latents[1])
    changed = dict(data, video=1 - data["video"])
    other = module.forward_preprocess(changed)
    assert module.parts.cache.hits == 5, "prompts are cached, pictures are not"
    assert not torch.equal(other.conditions["y"], latents)


def test_conditions_can_be_used_again(make_module: MakeModule) -> None:
    module = make_module(cache_bytes=0, **QUICK)
    data = small_clips(2)
    inputs = module.forward_preprocess(data)
    expected = module(data)
    again = module({}, inputs=inputs)
    assert [torch.equal(one, other) for one, other in zip(expected, again, strict=True)] == [True] * 3
