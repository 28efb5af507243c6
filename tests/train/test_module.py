"""One training step: with engines and without, cached and not, alone and in a batch, and where there is no face."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import frostline.models.vae as vae_file
from frostline.config import RewardSettings
from frostline.errors import ConfigError, DataError
from frostline.models.faces import quantize_frames
from frostline.models.tiny.clips import held_out_clips
from frostline.train.face_identity import FaceIdentityReward, face_identity_reward
from frostline.train.module import WanTrainingModule
from frostline.train.reward import RewardScore, reward_loss

if TYPE_CHECKING:
    from conftest import RewardTape

MakeModule = Callable[..., WanTrainingModule]

# Three Euler steps (and clips of 32×32 pixels), for what does not depend on what is in the picture.
QUICK: dict[str, Any] = {"num_inference_steps": 3, "mid_timestep": 1, "final_timestep": 2}


def clips(count: int, seed: int = 0, **size: int) -> dict[str, Any]:
    held_out = held_out_clips(count, seed, **size)
    return {"prompt": held_out.prompts, "video": held_out.video}


def small_clips(count: int, seed: int = 0) -> dict[str, Any]:
    return clips(count, seed, num_frames=5, size=32)


def row(data: dict[str, Any], index: int) -> dict[str, Any]:
    return {"prompt": [data["prompt"][index]], "video": data["video"][index : index + 1]}


def gradient(module: WanTrainingModule) -> Tensor:
    """The gradient of all LoRA matrices, flat, and none left behind."""
    parts = []
    for parameter in module.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts).double()


def assert_same_step(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    """loss, face_score, kl_loss."""
    for one, other in zip(expected, actual, strict=True):
        assert (one - other).abs().item() <= tolerance


def assert_same_gradient(expected: Tensor, actual: Tensor, norm: float = 1e-4) -> None:
    assert torch.nn.functional.cosine_similarity(expected, actual, dim=0) >= 0.99999
    assert (actual.norm() / expected.norm() - 1).abs() <= norm


def assert_same_steps(
    module: WanTrainingModule, other: WanTrainingModule, data: dict[str, Any], tape: "RewardTape"
) -> None:
    """Both compute the same step, forward and backward."""
    with tape.record(module):
        expected = module(data)
    expected[0].backward()
    expected_gradient = gradient(module)
    with tape.replay(other):
        actual = other(data)
    assert_same_step(expected, actual)
    actual[0].backward(retain_graph=True)
    # What the kinks of the embedder do to the norm is said at `RewardTape`.
    assert_same_gradient(expected_gradient, gradient(other), norm=1e-3)
    tape.holds_gradient = True
    actual[0].backward()
    assert_same_gradient(expected_gradient, gradient(other))
    assert module.last_metrics is not None
    assert other.last_metrics is not None
    assert other.last_metrics.per_sample["detection_rate"] == module.last_metrics.per_sample["detection_rate"]


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


def test_the_kl_of_a_new_lora_is_zero_with_engines(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines, lora_spread=0)
    _, _, kl_loss = module(small_clips(2))
    assert 0 <= kl_loss.item() <= 1e-10
    assert module.last_metrics is not None
    assert len(module.last_metrics.kl) == 4
    assert max(module.last_metrics.kl) <= 1e-10


def test_an_engine_follows_the_policy_after_an_optimizer_step(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines, **QUICK)
    files = {path: path.stat().st_mtime_ns for path in engines.rglob("*") if path.is_file()}
    stage = module.stages["denoiser"]
    inputs = stage.networks[0].samples("opt")
    base = {**inputs, "lora_scale": torch.zeros(())}
    before, base_before = module.runtime["denoiser"](**inputs), module.runtime["denoiser"](**base)
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-2)
    loss, _, _ = module(small_clips(1))
    loss.backward()
    optimizer.step()
    after = module.runtime["denoiser"](**inputs)["velocity"]
    assert (after - before["velocity"]).norm() > 0.01 * before["velocity"].norm()
    with torch.no_grad():
        torch.testing.assert_close(after, stage.torch(**inputs)["velocity"], atol=1e-5, rtol=0)
    torch.testing.assert_close(module.runtime["denoiser"](**base), base_before, atol=0, rtol=0)
    assert module.runtime.plan["denoiser"].backend == "onnxruntime"
    assert {path: path.stat().st_mtime_ns for path in engines.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-ti2v"])
def test_a_cached_step_is_the_uncached_one(model: str, make_module: MakeModule, tmp_path: Path) -> None:
    data = small_clips(2)
    uncached = make_module(model, cache_bytes=0, **QUICK)
    cached = make_module(model, cache_dir=tmp_path, **QUICK)
    expected = uncached(data)
    assert uncached.cache is None
    assert cached.cache is not None
    assert [torch.equal(one, other) for one, other in zip(expected, cached(data), strict=True)] == [True] * 3
    # Context, image latents and references of two samples; and with two experts the latents of the first.
    entries = 8 if model == "tiny-moe" else 6
    assert (cached.cache.hits, cached.cache.misses) == (0, entries)
    assert [torch.equal(one, other) for one, other in zip(expected, cached(data), strict=True)] == [True] * 3
    assert (cached.cache.hits, cached.cache.misses) == (entries, entries)
    assert len(list(tmp_path.glob("*.safetensors"))) == entries


def test_another_process_finds_the_cache_and_recomputes_what_is_damaged(
    make_module: MakeModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_clips(1)
    expected = make_module(cache_dir=tmp_path, **QUICK)(data)
    again = make_module(cache_dir=tmp_path, **QUICK)
    assert [torch.equal(one, other) for one, other in zip(expected, again(data), strict=True)] == [True] * 3
    assert again.cache is not None
    assert (again.cache.hits, again.cache.misses) == (3, 0)
    for path in tmp_path.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    damaged = make_module(cache_dir=tmp_path, **QUICK)
    assert [torch.equal(one, other) for one, other in zip(expected, damaged(data), strict=True)] == [True] * 3
    assert damaged.cache is not None
    assert (damaged.cache.corrupted, damaged.cache.hits) == (3, 0)
    assert caplog.text.count("is damaged") == 3
    repaired = make_module(cache_dir=tmp_path, **QUICK)
    repaired(data)
    assert repaired.cache is not None
    assert (repaired.cache.corrupted, repaired.cache.hits) == (0, 3)


def test_cached_conditions_are_not_shared_between_different_inputs(make_module: MakeModule) -> None:
    module = make_module(**QUICK)
    data = small_clips(2)
    both = module.forward_preprocess(data)
    alone = module.forward_preprocess(row(data, 1))
    assert module.cache is not None
    assert module.cache.hits == 3
    assert both.y is not None
    assert alone.y is not None
    assert torch.equal(alone.y[0], both.y[1])
    assert not torch.equal(both.y[0], both.y[1])
    changed = dict(data, video=1 - data["video"])
    other = module.forward_preprocess(changed)
    assert module.cache.hits == 5, "the prompts are known, the pictures are not"
    assert other.y is not None
    assert not torch.equal(other.y, both.y)


def test_conditions_can_be_used_again(make_module: MakeModule) -> None:
    module = make_module(cache_bytes=0, **QUICK)
    data = small_clips(2)
    inputs = module.forward_preprocess(data)
    expected = module(data)
    again = module({}, inputs=inputs)
    assert [torch.equal(one, other) for one, other in zip(expected, again, strict=True)] == [True] * 3


def test_a_batch_is_the_mean_of_its_samples(make_module: MakeModule, tape: "RewardTape") -> None:
    module = make_module(reward={"on_no_face": "zero"})
    data = clips(2, seed=3, num_frames=5)
    with tape.record(module):
        together = module(data)
    together[0].backward()
    expected = gradient(module)
    tape.holds_gradient = True
    alone = []
    for index in range(2):
        with tape.replay(module, slice(index, index + 1)):
            step = module(row(data, index))
        (step[0] / 2).backward()
        alone.append(torch.stack(step).detach())
    assert_same_step(together, tuple(torch.stack(alone).mean(dim=0)))
    assert_same_gradient(expected, gradient(module))


def test_fixed_noise_repeats_and_fresh_noise_does_not(make_module: MakeModule) -> None:
    data = small_clips(2)
    fixed = make_module(**QUICK)
    assert torch.equal(fixed(data)[2], fixed(data)[2])
    noise = fixed.noise(fixed.forward_preprocess(data))
    expected = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(24))
    assert torch.equal(noise, expected.expand(2, -1, -1, -1, -1))
    fresh = make_module(noise_seed=None, **QUICK)
    assert not torch.equal(fresh(data)[2], fresh(data)[2])
    noise = fresh.noise(fresh.forward_preprocess(data))
    assert not torch.equal(noise[0], noise[1])


def test_what_is_trained_is_what_is_sampled(make_module: MakeModule, tape: "RewardTape") -> None:
    module = make_module()
    inputs = module.forward_preprocess(small_clips(2))
    with tape.record(module):
        module({}, inputs)
    frames = quantize_frames(module.generate(inputs, module.noise(inputs)))
    difference = (frames.float() - tape.pixels.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_wieght": 1.0}, "kl_wieght: unknown setting, is kl_weight meant?"),
        ({"reward": {"baselin": 0.5}}, "reward.baselin: unknown setting, is baseline meant?"),
        ({"lora": {"r": 4}}, "lora.r: unknown setting"),
        ({"mid_timestep": 6, "final_timestep": 5}, "mid_timestep <= final_timestep < num_inference_steps"),
        ({"final_timestep": 8}, "mid_timestep <= final_timestep < num_inference_steps"),
        ({"shift": 0}, "shift"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"reward": {"on_no_face": "ignore"}}, "reward.on_no_face"),
        ({"reward": {"embedder": "clip"}}, "unknown face embedder 'clip'"),
        ({"lora": {"target_modules": ["nothing"]}}, "lora.target_modules"),
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WanTrainingModule.from_pretrained("tiny", engines=None, plan="torch", **settings)
    assert message in str(caught.value)


def no_face(count: int = 1) -> dict[str, Any]:
    names = [f"grey-{index}.mp4" for index in range(count)]
    return {"prompt": ["a person nods"] * count, "video": torch.full((count, 5, 3, 32, 32), 0.5), "sample_id": names}


def test_a_sample_without_a_face_is_named_and_gives_no_reward(
    make_module: MakeModule, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(kl_weight=0.0, **QUICK)
    loss, face_score, kl_loss = module(no_face(2))
    assert face_score.item() == 0
    assert loss.item() == 0
    assert kl_loss.item() > 0
    loss.backward()
    assert gradient(module).abs().max() == 0
    assert "sample grey-0.mp4, grey-1.mp4" in caplog.text
    assert module.last_metrics is not None
    assert module.last_metrics.per_sample["face_score"] == [0.0, 0.0]


def test_on_no_face_decides_what_such_a_sample_costs(make_module: MakeModule) -> None:
    losses = {}
    for what in ("skip", "zero"):
        module = make_module(kl_weight=0.0, reward={"on_no_face": what}, **QUICK)
        losses[what] = module(no_face())[0].item()
    assert losses["skip"] == 0
    assert losses["zero"] == pytest.approx(0.54 / 0.16 * 0.1)
    module = make_module(reward={"on_no_face": "error"}, **QUICK)
    with pytest.raises(DataError, match=r"sample grey-0\.mp4.*'video'.*on_no_face"):
        module(no_face())


@pytest.mark.parametrize("missing_face", ["exclude", "zero"])
def test_the_reward_of_rendered_frames(missing_face: str, make_module: MakeModule) -> None:
    """Half the frames of the first sample have no face, the second sample has none at all."""
    module = make_module(**QUICK)
    settings = RewardSettings(missing_face=missing_face)
    active = face_identity_reward(settings, module.runtime, module.embedder)
    reward = active.reward
    assert isinstance(reward, FaceIdentityReward)
    video = held_out_clips(2, seed=0, num_frames=5).video
    references = reward.references(video)
    assert references["found"].all()
    frames = video[:, :4].clone()
    frames[0, 2:] = 0.5
    frames[1] = 0.5
    frames.requires_grad_()
    score = reward.identity_score(frames, references)
    assert score.detection_rate.tolist() == [0.5, 0.0]
    assert score.valid.tolist() == [True, False]
    seen = score.frame_scores[0, :2].mean()
    assert seen > 0.7, "a face is its own best likeness"
    torch.testing.assert_close(score.face_score[0], seen if missing_face == "exclude" else seen / 2)
    torch.testing.assert_close(score.face_score_missing_zero[0], seen / 2)
    outcome = reward_loss([(active, RewardScore(score.face_score, score.valid))])
    torch.testing.assert_close(outcome.scores["face_score"], score.face_score[0].detach())
    torch.testing.assert_close(outcome.loss, -(score.face_score[0] - 0.54) / 0.16 * 0.1)
    outcome.loss.backward()
    assert frames.grad is not None
    changed = frames.grad.abs().amax(dim=(2, 3, 4)) > 0
    assert changed.tolist() == [[True, True, False, False], [False] * 4]


def test_the_example_of_the_design(engines: Path, make_module: MakeModule) -> None:
    """16 frames of 256×256 noise, on a plan with engines and without any setting."""
    module = WanTrainingModule.from_pretrained("tiny", engines=engines, plan="onnxruntime", strict=True)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 16, 3, 256, 256, generator=generator)
    loss, face_score, kl_loss = module.forward({"prompt": ["a person talking"], "video": video})
    assert [value.shape for value in (loss, face_score, kl_loss)] == [()] * 3
    assert torch.stack([loss.detach(), face_score, kl_loss]).isfinite().all()
    assert loss.requires_grad
    assert {choice.backend for choice in module.runtime.plan.values()} == {"onnxruntime"}


def test_gradient_checkpointing_changes_no_gradient(make_module: MakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is recomputed is decoded frame by frame, hence the other too: a clip at once is another order of sums,
    # which the tests of the VAE hold against this one.
    monkeypatch.setattr(vae_file, "decode_clip", lambda vae, latents: vae.model.decode(latents, vae.scale))
    data = clips(1, seed=3, num_frames=5)
    expected = None
    for how in ("none", "block", "full"):
        module = make_module(gradient_checkpointing=how, **QUICK)
        loss, face_score, _ = module(data)
        assert face_score != 0, "no gradient went through the VAE"
        loss.backward()
        if expected is None:
            expected = loss.detach(), gradient(module)
        assert torch.equal(loss, expected[0])
        if how != "none":
            torch.testing.assert_close(gradient(module), expected[1], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"video": torch.full((1, 5, 3, 32, 32), torch.nan)}, ["sample 0", "'video'", "NaN"]),
        ({"video": torch.full((1, 5, 3, 32, 32), 200.0)}, ["sample 0", "'video'", "divide by 255"]),
        ({"video": torch.zeros(1, 5, 32, 32, 3)}, ["'video'", "permute(0, 1, 4, 2, 3)"]),
        ({"video": torch.zeros(1, 5, 3, 32, 32, dtype=torch.uint8)}, ["'video'", "uint8"]),
        ({"prompt": ["  "], "sample_id": ["a.mp4"]}, ["sample a.mp4", "'prompt'", "empty"]),
        ({"prompt": ["one", "two"]}, ["'prompt'", "2 entries"]),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], fragments: list[str], quick_module: WanTrainingModule) -> None:
    with pytest.raises(DataError) as caught:
        quick_module.forward({**small_clips(1), **change})
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.fixture(scope="module")
def quick_module(make_module: MakeModule) -> WanTrainingModule:
    return make_module(**QUICK)


def test_metrics_of_the_last_step(make_module: MakeModule, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    module = make_module("tiny-moe")
    assert module.last_metrics is None
    data = {**small_clips(2), "sample_id": ["a.mp4", "b.mp4"]}
    _, face_score, kl_loss = module(data)
    metrics = module.last_metrics
    assert metrics is not None
    assert metrics.sample_id == ("a.mp4", "b.mp4")
    of_each = metrics.per_sample
    assert {name: len(values) for name, values in of_each.items()} == {
        "face_score": 2,
        "detection_rate": 2,
        "face_score_missing_zero": 2,
    }
    assert all(0 <= rate <= 1 for rate in of_each["detection_rate"])
    assert len(metrics.kl) == 4
    assert min(metrics.kl) > 0
    assert sum(metrics.kl) / 4 == pytest.approx(kl_loss.item())
    found = [score for score, rate in zip(of_each["face_score"], of_each["detection_rate"], strict=True) if rate]
    assert face_score.item() == pytest.approx(sum(found) / max(len(found), 1))
    calls = {name: (time.backend, time.calls) for name, time in metrics.stages.items()}
    assert calls["text_encoder"] == calls["vae_encoder"] == ("torch", 1)
    # Three steps of the first expert, one of the second, and one call for the references of all four KL terms.
    assert calls["denoiser_high_noise"] == ("torch", 3)
    assert calls["denoiser"] == ("torch", 2)
    assert calls["vae_decoder"] == ("torch", 1)
    assert calls["face_detector"] == ("torch", 2)
    assert all(time.milliseconds > 0 for time in metrics.stages.values())
    module(data)
    assert module.last_metrics is not None
    assert "text_encoder" not in module.last_metrics.stages, "what is cached takes no time"


@pytest.mark.parametrize("model", ["tiny", "tiny-ti2v"])
def test_a_step_in_bf16_is_finite(model: str, make_module: MakeModule) -> None:
    data = small_clips(2)
    exact = make_module(model, lora_spread=0.1, **QUICK)
    half = make_module(model, dtype=torch.bfloat16, lora_spread=0.1, **QUICK)
    assert half.components.denoiser.patch_embedding.weight.dtype == torch.bfloat16
    expected, step = exact(data), half(data)
    step[0].backward()
    assert torch.stack(step).isfinite().all()
    assert gradient(half).isfinite().all()
    assert {parameter.dtype for parameter in half.trainable_parameters().values()} == {torch.float32}
    assert step[2].item() == pytest.approx(expected[2].item(), rel=0.2)


def test_no_activation_is_kept_in_the_vae(quick_module: WanTrainingModule) -> None:
    """diffsynth's own `decode` leaves its caches, and with them the graph of the step, in lists of the module."""
    quick_module(small_clips(1))
    assert [kept for kept in quick_module.components.vae.model._feat_map if kept is not None] == []


def test_only_the_lora_is_trained(quick_module: WanTrainingModule) -> None:
    trained = {name for name, parameter in quick_module.named_parameters() if parameter.requires_grad}
    assert trained == {f"denoiser.model.{name}" for name in quick_module.trainable_parameters()}
    assert len(trained) == 4 * 10 * 2
