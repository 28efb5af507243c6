"""A training step in PyTorch: alone and in a batch, with and without faces, and its metrics."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from steps import QUICK, assert_same_gradient, assert_same_step, clips, gradient, row, small_clips

import frostline.models.wan.vae as vae_file
import frostline.train.step.module as module_file
from frostline.errors import ConfigError, DataError
from frostline.models.checkpoints.loading import load_components
from frostline.models.faces import quantize_frames
from frostline.models.video_shape import VideoShape
from frostline.models.wan.vae_chunks import decode_in_chunks
from frostline.rewards.active import RewardStages
from frostline.rewards.face_identity.reward import FaceIdentityReward
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.loss import reward_loss
from frostline.rewards.reward import RewardScore
from frostline.runtime.identity.fingerprint import precision_of
from frostline.train import WanTrainingModule

if TYPE_CHECKING:
    from conftest import RewardTape

MakeModule = Callable[..., WanTrainingModule]

SHARPNESS = {"type": "sharpness", "baseline": 0.0, "scale": 1.0}
TWO_REWARDS = [SHARPNESS, {"type": "face_identity"}]


def test_a_batch_is_the_mean_of_its_samples(make_module: MakeModule, tape: "RewardTape") -> None:
    module = make_module(rewards=[{"type": "face_identity", "on_unscored": "zero"}])
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
        ({"kl_wieght": 1.0}, "kl_wieght: unknown setting, did you mean kl_weight?"),
        (
            {"rewards": [{"type": "face_identity", "baselin": 0.5}]},
            "rewards.0.baselin: unknown setting, did you mean baseline?",
        ),
        ({"lora": {"r": 4}}, "lora.r: unknown setting"),
        ({"grad_start_step": 6, "grad_end_step": 5}, "grad_start_step <= grad_end_step < num_inference_steps"),
        ({"grad_end_step": 8}, "grad_start_step <= grad_end_step < num_inference_steps"),
        ({"shift": 0}, "shift"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"rewards": [{"type": "face_identity", "on_unscored": "ignore"}]}, "rewards.0.on_unscored"),
        ({"rewards": [{"type": "face_identity", "embedder": "clip"}]}, "unknown face embedder 'clip'"),
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


def test_on_unscored_decides_what_such_a_sample_costs(make_module: MakeModule) -> None:
    losses = {}
    for what in ("skip", "zero"):
        module = make_module(kl_weight=0.0, rewards=[{"type": "face_identity", "on_unscored": what}], **QUICK)
        losses[what] = module(no_face())[0].item()
    assert losses["skip"] == 0
    assert losses["zero"] == pytest.approx(0.54 / 0.16 * 0.1)
    module = make_module(rewards=[{"type": "face_identity", "on_unscored": "error"}], **QUICK)
    with pytest.raises(DataError, match=r"sample grey-0\.mp4.*'video'.*on_unscored"):
        module(no_face())


def test_a_tail_without_a_lora_is_refused(make_module: MakeModule) -> None:
    module = make_module("tiny-moe", num_inference_steps=8, grad_start_step=0, grad_end_step=2)
    with pytest.raises(ConfigError, match=r"grad_end_step 2: the high-noise expert.* runs the first 3 steps"):
        module(small_clips(1))


@pytest.mark.parametrize("missing_face", ["exclude", "zero"])
def test_the_reward_of_rendered_frames(missing_face: str, make_module: MakeModule) -> None:
    """Half of the frames of the first sample have no face, and the second sample has none."""
    module = make_module(rewards=[{"type": "face_identity", "missing_face": missing_face}], **QUICK)
    (active,) = module.rewards
    reward, run = active.reward, RewardStages(module.runtime, active.stage_names)
    assert isinstance(reward, FaceIdentityReward)
    video = clips(2, num_frames=5)["video"]
    references = reward.references(RewardInputs(("", ""), video, (5, 5)), run)
    assert references["found"].all()
    frames = video[:, :4].clone()
    frames[0, 2:] = 0.5
    frames[1] = 0.5
    frames.requires_grad_()
    score = reward.identity_score(frames, references, run)
    assert score.detection_rate.tolist() == [0.5, 0.0]
    # If a frame without a face counts as 0, a video without any face is also valid.
    assert score.valid.tolist() == [True, missing_face == "zero"]
    seen = score.frame_scores[0, :2].mean()
    assert seen > 0.7, "a face must be similar to itself"
    torch.testing.assert_close(score.face_score[0], seen if missing_face == "exclude" else seen / 2)
    torch.testing.assert_close(score.face_score_missing_zero[0], seen / 2)
    outcome = reward_loss([(active, RewardScore(score.face_score, score.valid))])
    mean = score.face_score[0] if missing_face == "exclude" else score.face_score[0] / 2
    torch.testing.assert_close(outcome.scores["face_score"], mean.detach())
    torch.testing.assert_close(outcome.loss, -(mean - 0.54) / 0.16 * 0.1)
    outcome.loss.backward()
    assert frames.grad is not None
    changed = frames.grad.abs().amax(dim=(2, 3, 4)) > 0
    assert changed.tolist() == [[True, True, False, False], [False] * 4]


def test_gradient_checkpointing_changes_no_gradient(make_module: MakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    # With recomputation, the clip is decoded chunk by chunk, so this is done here in all modes. Decoding the clip at
    # once adds numbers in another order; the tests of the VAE compare both.
    monkeypatch.setattr(
        vae_file, "decode_clip", lambda vae, latents: decode_in_chunks(vae_file.decoder_chunks(vae), latents)
    )
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


def test_checkpointing_is_settled_for_the_largest_shape(
    make_module: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[VideoShape] = []

    def choose(components: Any, settings: Any, shape: VideoShape, free: int, embedder: Any) -> str:
        assert free > 0
        assert embedder is not None
        seen.append(shape)
        return "block"

    monkeypatch.setattr(module_file, "fitting_checkpointing", choose)
    module = make_module(gradient_checkpointing="auto", **QUICK)
    assert module.gradient_checkpointing is None
    with torch.no_grad():
        module(small_clips(2))
    assert seen == [], "without a gradient, no mode must be chosen"
    for count in (1, 1, 2, 1):
        module(small_clips(count))
    assert seen == [VideoShape(1, 5, 32, 32), VideoShape(2, 5, 32, 32)]
    assert module.gradient_checkpointing == "block"
    assert module.trained_experts[-1].module.checkpoint_blocks
    resumed = make_module(gradient_checkpointing="auto", **QUICK)
    resumed.checkpoint("full")
    resumed(small_clips(1))
    assert resumed.gradient_checkpointing == "full", "the mode in the checkpoint must be used"
    assert len(seen) == 2


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


def test_inputs_are_those_of_this_model(make_module: MakeModule, quick_module: WanTrainingModule) -> None:
    data = small_clips(1)
    wrong: list[tuple[Any, str]] = [
        *(
            (value, f"must be the return value of forward_preprocess, not {type(value).__name__}")
            for value in (data, (1,), "x")
        ),
        (make_module("tiny-ti2v", **QUICK).forward_preprocess(data), "belong to another model or to other rewards"),
        (
            make_module(rewards=TWO_REWARDS, **QUICK).forward_preprocess(data),
            "belong to another model or to other rewards",
        ),
    ]
    own = quick_module.forward_preprocess(data)
    noise = quick_module.noise(own)
    for inputs, said in wrong:
        with pytest.raises(DataError, match=f"^inputs: {said}"):
            quick_module(data, inputs)
        with pytest.raises(DataError, match=f"^inputs: {said}"):
            quick_module.generate(inputs, noise)
    assert torch.equal(quick_module(None, own)[0], quick_module(data)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "bf16", None])
def test_weights_of_other_types_are_refused_before_a_model_is_loaded(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"^dtype: weights cannot be .*: use one of torch\.float32, torch\.float16"):
        WanTrainingModule.from_pretrained("nowhere", dtype=dtype)


def test_weights_that_became_of_another_type_are_refused(make_module: MakeModule) -> None:
    components = load_components("tiny")
    components.denoiser.double()
    with pytest.raises(ConfigError, match=r"^dtype: weights cannot be torch\.float64"):
        precision_of(WanTrainingModule(components, plan="torch").stages["denoiser"])


def test_a_device_that_is_none_is_refused() -> None:
    for device in ("gpu", "meta", torch.device("meta")):
        with pytest.raises(ConfigError, match="is not supported: use auto, cpu, cuda"):
            WanTrainingModule.from_pretrained("tiny", device=device)


@pytest.mark.parametrize("checkpointing", ["auto", "block", "full"])
def test_anomaly_detection_finds_none(checkpointing: str, make_module: MakeModule) -> None:
    data = small_clips(1)
    gradients = []
    for detect in (False, True):
        module = make_module(gradient_checkpointing=checkpointing, **QUICK)
        with torch.autograd.set_detect_anomaly(detect):
            module(data)[0].backward()
            assert torch.is_anomaly_enabled() == detect
        gradients.append(gradient(module))
    assert_same_gradient(*gradients)


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
    assert min(metrics.kl.values()) > 0
    assert [*metrics.kl] == [4, 5, 6, 7]
    assert sum(metrics.kl.values()) / 4 == pytest.approx(kl_loss.item())
    found = [score for score, rate in zip(of_each["face_score"], of_each["detection_rate"], strict=True) if rate]
    assert face_score.item() == pytest.approx(sum(found) / max(len(found), 1))
    calls = {name: (time.backend, time.calls) for name, time in metrics.stages.items()}
    assert calls["text_encoder"] == calls["vae_encoder"] == ("torch", 1)
    # Three steps of the high-noise expert, one of the low-noise one, and one call for the references of all four KL
    # terms.
    assert calls["denoiser_high_noise"] == ("torch", 3)
    assert calls["denoiser"] == ("torch", 2)
    assert calls["vae_decoder_live"] == ("torch", 1)
    assert calls["face_detector"] == ("torch", 2)
    assert all(time.milliseconds > 0 for time in metrics.stages.values())
    module(data)
    assert module.last_metrics is not None
    assert "text_encoder" not in module.last_metrics.stages, "a stage with cached outputs must not run"


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
    """diffsynth's own `decode` would keep its caches, and with them the graph of the step, in lists of the module."""
    quick_module(small_clips(1))
    assert [kept for kept in quick_module.components.vae.model._feat_map if kept is not None] == []


def test_only_the_lora_is_trained(quick_module: WanTrainingModule) -> None:
    trained = {name for name, parameter in quick_module.named_parameters() if parameter.requires_grad}
    assert trained == {f"denoiser.model.{name}" for name in quick_module.trainable_parameters()}
    assert len(trained) == 4 * 10 * 2
