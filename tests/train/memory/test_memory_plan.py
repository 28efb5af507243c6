"""The memory plan compared with real models and allocations; effects of engines, the cache and sharding."""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffsynth.configs.model_configs import MODEL_CONFIGS
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from frostline.config import CHECKPOINTING, LoraSettings
from frostline.errors import ConfigError
from frostline.models.block_offload import BlockOffload
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import RELEASED, read_spec
from frostline.models.lora.inject import inject_lora
from frostline.models.video_shape import VideoShape
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.vae import decode_latents, use_onednn_conv3d
from frostline.rewards.face_identity import Config
from frostline.stages.wan.family import empty_model, video_model
from frostline.train.memory import memory_profile as footprint
from frostline.train.memory.checkpointing import fitting_checkpointing
from frostline.train.memory.measurements import Measurements
from frostline.train.memory.memory_profile import (
    judge_bytes,
    measure_decoder,
    measure_live_stages,
    measure_rewards,
)
from frostline.train.memory.offload import saved_without_copies
from frostline.train.memory.plan import MemoryPlan, memory_plan
from frostline.train.memory.table import memory_table
from frostline.train.step_settings import TrainingModuleSettings

CLIP = VideoShape(batch_size=1, num_frames=9, height=96, width=96)


def settings(**values: Any) -> TrainingModuleSettings:
    return TrainingModuleSettings.parse({"lora": {"rank": 8}, **values})


def sizes(plan: Any, field: str) -> dict[str, int]:
    return {stage.stage: getattr(stage, field) for stage in plan.stages}


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-ti2v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_a_loaded_model_holds(model: str, dtype: torch.dtype) -> None:
    plan = memory_plan(model, settings(), VideoShape(1, 5, 32, 32), dtype=dtype)
    components = load_components(model, dtype)
    held = {name: sum(p.nbytes for p in module.parameters()) for name, module in components.modules()}
    weights = sizes(plan, "weights")
    assert weights.pop("vae_encoder") + weights.pop("vae_decoder") == held.pop("vae")
    assert weights == held
    inject_lora(components.denoiser, 8)
    trained = sum(p.nbytes for p in components.denoiser.parameters() if p.requires_grad)
    assert (plan.adapter, plan.gradients, plan.optimizer) == (trained, trained, 2 * trained)
    assert plan.resident == sum(sizes(plan, "weights").values()) + 4 * trained
    assert not plan.assumed


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes that PyTorch's CPU allocator held when `run` returned, and the maximum during `run`."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events: Any = profiled.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    del result
    return held, peak


@pytest.mark.parametrize("checkpointing", ["none", "block", "full"])
def test_activations_are_those_that_a_real_step_allocates(checkpointing: Any) -> None:
    components = load_components("tiny")
    inject_lora(components.denoiser, 8)
    denoiser = Denoiser(components.denoiser)
    step = footprint._tail(denoiser, ["latents", "timestep", "context", "y"], checkpointing)
    latents = torch.randn(1, 16, 3, 12, 12, requires_grad=True)
    others = (torch.full((1,), 500.0), torch.randn(1, 16, 64), torch.randn(1, 20, 3, 12, 12))

    def frozen() -> None:
        with torch.no_grad():
            denoiser(latents, *others)

    def live() -> None:
        step(latents, *others).sum().backward()

    live()  # gradients exist from now on, as in the plan
    plan = memory_plan("tiny", settings(gradient_checkpointing=checkpointing), CLIP, dtype=torch.float32)
    assert allocated(frozen)[1] == pytest.approx(sizes(plan, "frozen_peak")["denoiser"], rel=0.1)
    assert allocated(live)[1] == pytest.approx(sizes(plan, "live_peak")["denoiser"], rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "block", "full"])
def test_blocks_that_wait_take_the_window_on_the_device_and_the_rest_in_main_memory(checkpointing: Any) -> None:
    components = load_components("tiny")
    inject_lora(components.denoiser, 8)
    denoiser = Denoiser(components.denoiser)
    step = footprint._tail(denoiser, ["latents", "timestep", "context", "y"], checkpointing)
    latents = torch.randn(1, 16, 3, 12, 12, requires_grad=True)
    others = (torch.full((1,), 500.0), torch.randn(1, 16, 64), torch.randn(1, 20, 3, 12, 12))

    def live() -> None:
        offloads = [] if denoiser.offload is None or checkpointing != "none" else [denoiser.offload]
        with saved_without_copies(offloads):
            velocity = step(latents, *others)
        velocity.sum().backward()

    live()
    whole = allocated(live)[1]
    denoiser.offload = BlockOffload(denoiser.blocks, 4)
    # On a CPU, the weights are in main memory in any case; only the copies are additional.
    grown = allocated(live)[1] - whole
    plan, waiting = (
        memory_plan(
            *("tiny", settings(gradient_checkpointing=checkpointing), CLIP),
            dtype=torch.float32,
            offload_blocks=count,
        )
        for count in (0, 4)
    )
    window = waiting.resident - plan.resident + waiting.main_memory
    assert window == denoiser.offload.window_bytes
    assert 0.5 * window <= grown <= window
    assert waiting.main_memory == sum(weight.nbytes for weight in denoiser.offload.weights())
    assert waiting.peaks == plan.peaks
    assert sizes(waiting, "weights")["text_encoder"] == sizes(plan, "weights")["text_encoder"]
    assert f"4 blocks of each denoiser are offloaded to main memory: {waiting.main_memory / 1e9:.2f} GB" in (
        printed(waiting)
    )


def test_decoding_is_planned_as_it_is() -> None:
    vae = load_components("tiny").vae
    # As in training; torch's own slow path would unfold its input.
    use_onednn_conv3d(vae)
    latents = torch.randn(1, 16, 3, 12, 12, requires_grad=True)
    model = empty_model(read_spec("tiny"), torch.float32, settings().lora)
    planned = measure_decoder(model, CLIP, "none")["vae_decoder"]
    held, peak = allocated(lambda: decode_latents(vae, latents))
    assert held == pytest.approx(planned.kept, rel=0.01)
    assert peak == pytest.approx(planned.forward_peak, rel=0.05)
    # Backward cannot be compared, because oneDNN's kernels allocate scratch memory.
    assert planned.backward_peak > planned.kept


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_many_blocks_and_chunks_are_planned_from_a_few(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = read_spec("tiny")
    deep = replace(tiny, networks={**tiny.networks, "denoiser": {**tiny.networks["denoiser"], "num_layers": 7}})
    model = empty_model(deep, torch.float32, settings().lora)
    shape = VideoShape(1, 29, 64, 96)
    planned = measure_live_stages(model, shape, kind)
    monkeypatch.setattr(footprint, "_FEW_BLOCKS", 100)
    monkeypatch.setattr(footprint, "_FEW_CHUNKS", 100)
    assert planned == measure_live_stages(model, shape, kind)


def test_the_embedder_is_planned_as_it_is() -> None:
    reward: Any = Config().build()
    judges = {"judge_sharp": 10**6}
    plan = memory_plan("tiny", settings(), CLIP, dtype=torch.float32, rewards=[reward], judges=judges)
    # A judge needs memory only for its weights, all the time.
    *_, judge = plan.stages
    assert (judge.stage, judge.weights, judge.frozen_peak + judge.kept + judge.live_peak) == ("judge_sharp", 10**6, 0)
    embedder = reward.faces.embedder
    # All networks are in memory, also the detector, as for a judge.
    of_reward = {name: size for name, size in sizes(plan, "weights").items() if name.startswith("face_")}
    assert {*of_reward} == {"face_embedder", "face_score (frozen)"}
    assert sum(of_reward.values()) == judge_bytes(reward, reward.config)[1]
    faces = torch.rand(9, 3, 112, 112, requires_grad=True)
    _, measured = allocated(lambda: embedder(faces).sum().backward())
    assert measured == pytest.approx(sizes(plan, "live_peak")["face_embedder"], rel=0.15)


@pytest.mark.parametrize(
    ("decode", "frames", "looked_at"),
    [
        ({}, "random:3", 4),
        ({"num_latent_frames": 1}, "all", 5),
        ({"num_latent_frames": 1, "position": "last"}, "every:2", 3),
        ({"num_latent_frames": 2, "position": "first"}, "all", 5),
        ({"num_latent_frames": 5}, "all", 9),
    ],
)
def test_rewards_are_planned_for_the_frames_that_they_look_at(
    decode: dict[str, Any], frames: str, looked_at: int
) -> None:
    """Count the first frame and the selected frames of the window, of 9 frames (3 latent frames)."""
    reward: Any = Config.parse({"frames": frames}).build()
    (one,) = reward.live_networks(replace(CLIP, num_frames=1))
    assert one.uses == 1
    how, seen = settings(decode=decode, gradient_checkpointing="auto"), []
    reward.live_networks = lambda shape: seen.extend(type(reward).live_networks(reward, shape)) or seen[-1:]
    planned = sizes(memory_plan("tiny", how, CLIP, dtype=torch.float32, rewards=[reward]), "kept")["face_embedder"]
    fitting_checkpointing(video_model(load_components("tiny"), LoraSettings(rank=8)), how, CLIP, 10**12, [reward])
    assert [each.uses for each in seen] == [looked_at, looked_at]
    alone = measure_rewards([Config().build()], replace(CLIP, num_frames=1))["face_embedder"]
    assert planned == looked_at * alone.kept


def test_releases_are_the_ones_that_diffsynth_knows() -> None:
    known = [config.get("extra_kwargs", {}) for config in MODEL_CONFIGS]
    told = ("in_dim", "dim", "ffn_dim", "out_dim", "num_heads", "num_layers", "has_image_input", "text_dim", "freq_dim")
    for name, networks in RELEASED.items():
        arguments = networks["denoiser"]
        assert any(all(one.get(key) == arguments[key] for key in told) for one in known), name


# Billions of parameters, counted in the released files.
@pytest.mark.parametrize(
    ("release", "denoiser", "vae"),
    [
        ("Wan2.1-T2V-1.3B", 1.419, 0.127),
        ("Wan2.1-I2V-14B-480P", 16.395, 0.127),
        ("Wan2.2-I2V-A14B", 14.289, 0.127),
        ("Wan2.2-TI2V-5B", 5.000, 0.705),
    ],
)
def test_releases_without_any_files(release: str, denoiser: float, vae: float) -> None:
    shape = VideoShape(1, 5, 64, 64)
    plan = memory_plan(f"checkpoints/{release}", settings(gradient_checkpointing="block"), shape)
    weights = {name: size / 2e9 for name, size in sizes(plan, "weights").items()}
    assert weights["denoiser"] == pytest.approx(denoiser, rel=2e-3)
    assert weights.get("denoiser_high_noise", denoiser) == pytest.approx(denoiser, rel=2e-3)
    assert weights["vae_encoder"] + weights["vae_decoder"] == pytest.approx(vae, rel=5e-3)
    assert weights["text_encoder"] == pytest.approx(5.681, rel=2e-3)
    assert weights.get("image_encoder", 0.632) == pytest.approx(0.632, rel=5e-3)
    assert plan.assumed
    assert f"sizes are those of the release {release}" in printed(plan)


def test_engines_take_weights_out_of_pytorch() -> None:
    base = memory_plan("tiny-moe", settings(), CLIP)
    served = memory_plan("tiny-moe", settings(), CLIP, engines=("denoiser_high_noise", "denoiser", "vae_encoder"))
    weights = sizes(base, "weights")
    for name in ("denoiser_high_noise", "vae_encoder"):
        assert (sizes(served, "weights")[name], sizes(served, "engine")[name]) == (0, weights[name])
    # The denoiser is also live, so its engine is a second copy.
    assert sizes(served, "weights")["denoiser"] == sizes(served, "engine")["denoiser"] == weights["denoiser"]


def test_what_sharding_divides() -> None:
    one = memory_plan("tiny", settings(), CLIP)
    for sharding, divided in (("ddp", 0), ("zero2", 3), ("fsdp", 0), ("zero3", 4)):
        plan = memory_plan("tiny", settings(), CLIP, num_processes=4, sharding=sharding)  # type: ignore[arg-type]
        parts = (plan.optimizer // 2, plan.optimizer // 2, plan.gradients, plan.adapter)
        assert sum(part == -(-one.adapter // 4) for part in parts) == divided
        shared = sizes(plan, "weights")["denoiser"] < sizes(one, "weights")["denoiser"]
        assert shared == (sharding in ("fsdp", "zero3"))
        assert plan.peaks == one.peaks


def test_more_tail_steps_keep_more_and_checkpointing_less() -> None:
    def kept(**values: Any) -> int:
        return sizes(memory_plan("tiny", settings(**values), CLIP), "kept")["denoiser"]

    assert kept(grad_start_step=4) == 4 * kept(grad_start_step=7)
    assert kept() > 4 * kept(gradient_checkpointing="block") > kept(gradient_checkpointing="full")
    # The high-noise expert computes the first three of eight steps.
    moe = memory_plan("tiny-moe", settings(grad_start_step=0), CLIP)
    assert sizes(moe, "kept")["denoiser"] == 5 * kept(grad_start_step=7)


def test_the_loras_and_activations_of_both_experts_count() -> None:
    def plan(experts: str, **values: Any) -> MemoryPlan:
        given = settings(grad_start_step=0, lora={"rank": 4, "experts": experts}, **values)
        return memory_plan("tiny-moe", given, CLIP, engines="all")

    low, high, both = (plan(experts) for experts in ("low", "high", "both"))
    assert both.adapter == low.adapter + high.adapter
    assert (both.gradients, both.optimizer) == (both.adapter, 2 * both.adapter)
    assert 0 < high.adapter < low.adapter, "the high-noise expert of tiny-moe has fewer blocks"
    # Stages through which a gradient flows stay in PyTorch.
    assert sizes(low, "weights")["denoiser_high_noise"] == 0 < sizes(low, "engine")["denoiser_high_noise"]
    for each in (high, both):
        assert sizes(each, "engine")["denoiser_high_noise"] == 0 < sizes(each, "weights")["denoiser_high_noise"]
        assert sizes(each, "kept")["denoiser_high_noise"] > 0
    assert sizes(low, "kept")["denoiser_high_noise"] == 0
    assert sizes(both, "kept")["denoiser"] == sizes(low, "kept")["denoiser"]
    assert 0 < sizes(high, "kept")["denoiser"] < sizes(low, "kept")["denoiser"], (
        "without a LoRA, no inputs of its layers are kept"
    )
    alone = plan("high", backprop={"stop_latent_gradient": True})
    assert sizes(alone, "kept")["denoiser"] == 0
    assert both.peaks["backward"] > low.peaks["backward"]


def test_the_table_says_whether_it_fits() -> None:
    plan = memory_plan("tiny-moe", settings(), CLIP, num_processes=8, device_bytes=80 * 10**9)
    text = printed(plan)
    assert f"8 processes (ddp): peak {plan.peak / 1e9:.2f} GB per device, which has 80.00: fits" in text
    assert "denoiser_high_noise" in text
    assert replace(plan, device_bytes=10**6).fits is False
    assert "does not fit" in printed(replace(plan, device_bytes=10**6))
    assert replace(plan, device_bytes=None).fits is None


def printed(plan: MemoryPlan) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(memory_table(plan))
    return captured.get()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "checkpoints/Wan3"}, "neither a directory nor the name of a release"),
        ({"engines": ("vae_coder",)}, "no stage 'vae_coder'"),
        ({"sharding": "dp"}, "unknown sharding 'dp'"),
        ({"num_processes": 0}, "num_processes must be at least 1"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        memory_plan(**{"model": "tiny", "settings": settings(), "shape": CLIP, **changes})


def test_the_spec_of_files_is_that_of_the_loaded_model() -> None:
    spec = read_spec("tiny-moe")
    assert spec.networks.keys() == {name for name, _ in load_components("tiny-moe").modules()}
    assert (spec.text_length, spec.boundary, spec.from_files) == (16, 0.9, True)
    assert read_spec("Wan2.2-T2V-A14B-Diffusers").boundary == 0.875


def described(model: Any) -> list[tuple[str, torch.dtype, torch.device, torch.Size, bool]]:
    """Return name, dtype, device, shape and `requires_grad` of all parameters of a model."""
    return [
        (name, p.dtype, p.device, p.shape, p.requires_grad)
        for module in model.modules()
        for name, p in module.named_parameters()
    ]


def test_memory_chooses_how_much_is_recomputed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choose the same for a loaded model and for files, without changing the loaded model."""
    caplog.set_level(logging.INFO)
    components, rewards = load_components("tiny"), [Config().build()]
    model = video_model(components, LoraSettings(rank=8))
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in components.denoiser.named_parameters()}
    scale = components.vae.scale
    shape, auto = VideoShape(2, 5, 64, 64), settings(gradient_checkpointing="auto")
    # Measurements do not depend on the available memory: files and loaded model are measured once for each mode.
    measurements = Measurements("tiny")
    parameters = described(measurements.model(torch.float32, auto.lora))
    of_loaded = functools.cache(lambda kind: footprint.measure_live_stages(model, shape, kind))

    def measured_loaded(given: Any, given_shape: VideoShape, kind: Any, window: int | None = None) -> Any:
        assert given is model
        assert given_shape == shape
        assert kind in CHECKPOINTING
        return of_loaded(kind)

    monkeypatch.setattr("frostline.train.memory.checkpointing.measure_live_stages", measured_loaded)

    def plan(how: TrainingModuleSettings, device_bytes: int | None = None) -> MemoryPlan:
        options: dict[str, Any] = {"dtype": torch.float32, "rewards": rewards, "device_bytes": device_bytes}
        return memory_plan("tiny", how, shape, **options, measurements=measurements)

    plans = [plan(settings(gradient_checkpointing=kind)) for kind in CHECKPOINTING]
    needs = [each.gradients + each.optimizer + max(each.peaks.values()) for each in plans]
    assert needs == sorted(needs, reverse=True)
    for each, need in zip(plans, needs, strict=True):
        kind, free = each.gradient_checkpointing, int(need / 0.8) + 1
        assert fitting_checkpointing(model, auto, shape, free, rewards) == kind
        enough = each.resident + free
        assert plan(auto, enough) == replace(each, device_bytes=enough)
    assert "a step may run out of memory" not in caplog.text
    assert fitting_checkpointing(model, auto, shape, int(needs[-1] / 0.8) - 10, rewards) == "full"
    assert "full, but a step may run out of memory" in caplog.text
    assert fitting_checkpointing(model, settings(gradient_checkpointing="block"), shape, 1) == "block"
    assert plan(auto).gradient_checkpointing == "none", "the memory of the device is not known"
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in components.denoiser.named_parameters()} == before
    assert components.vae.scale is scale
    assert described(measurements.model(torch.float32, auto.lora)) == parameters
