"""The time estimate of a plan: how often a step uses each stage, and the resulting latency."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.export.plan_estimate import _candidate, step_gain
from frostline.export.tables import step_gain_lines
from frostline.models.denoise_steps import DenoiseSteps
from frostline.rewards.face_identity import Config
from frostline.runtime.planning.plan import Choice, Plan
from frostline.runtime.runtime import Runtime
from frostline.stages.provider import Use
from frostline.stages.wan.uses import step_uses
from frostline.train.step_settings import TrainingModuleSettings

ONCE = {"text_encoder": 1, "image_encoder": 1, "vae_encoder": 1, "face_detector": 2, "face_embedder": 1}


def counts(steps: DenoiseSteps, live: bool) -> Counter[str]:
    """Return how often a step uses each stage, for a model with CLIP and the reward `face_identity`."""
    total: Counter[str] = Counter()
    for use in (*step_uses(steps, clip=True), *Config.uses):
        if use.live == live:
            total[use.stage] += use.count
    return total


def test_the_reference_step_with_one_expert() -> None:
    """Count four steps of the rollout head, and the KL references of four tail steps."""
    uses = counts(DenoiseSteps(4, 7), live=False)
    assert uses == {**ONCE, "denoiser": 8}


def test_the_reference_step_with_two_experts() -> None:
    uses = counts(DenoiseSteps.of(TrainingModuleSettings(), 0.9, two_experts=True), live=False)
    assert uses == {**ONCE, "denoiser": 1 + 4, "denoiser_high_noise": 3}


@given(st.integers(1, 30), st.data())
def test_uses_are_those_of_the_steps_one_by_one(N: int, data: st.DataObject) -> None:
    """Count like `Sampler`: a live step has a graph if its expert has a LoRA, or after such a step.

    The latter does not apply if the gradient of the latents is stopped. A live step whose expert has a LoRA also has a
    KL reference.
    """
    end = data.draw(st.integers(0, N - 1))
    start, high = data.draw(st.integers(0, end)), data.draw(st.integers(0, N))
    strategy = data.draw(st.sampled_from(["tail", "last", "random", "uniform", "steps"]))
    count = data.draw(st.integers(1, end - start + 1)) if strategy in ("random", "uniform") else 0
    window = range(start, end + 1)
    listed = tuple(sorted(data.draw(st.sets(st.sampled_from(window), min_size=1)))) if strategy == "steps" else ()
    experts, stop = data.draw(st.sampled_from(["low", "high", "both"])), data.draw(st.booleans())
    steps = DenoiseSteps(start, end, high, strategy, count, listed, experts, stop)
    frozen, live, behind_a_lora, with_lora = Counter[str](), Counter[str](), False, 0
    for index in range(end + 1):
        stage, expert = ("denoiser_high_noise", "high") if index < high else ("denoiser", "low")
        adapted = index in steps.most_live and experts in (expert, "both")
        behind_a_lora |= adapted
        passes_on = index in steps.most_live and behind_a_lora and not stop
        live[stage] += adapted or passes_on
        frozen[stage] += adapted or not passes_on
        with_lora += adapted
    assert steps.live_with_lora == with_lora
    assert counts(steps, live=False) == Counter(ONCE) + frozen
    assert counts(steps, live=True) == live + Counter(vae_decoder=1, face_embedder=1)


def runtime(**choices: Choice) -> Any:
    return SimpleNamespace(plan=Plan(choices))


def test_a_step_costs_uses_times_latency() -> None:
    planned = runtime(
        text_encoder=Choice("onnxruntime", "fastest", {"torch": 3.0, "onnxruntime": 1.0}),
        denoiser=Choice("onnxruntime", "fastest", {"torch": 10.0, "onnxruntime": 4.0, "openvino": 5.0}),
        vae_encoder=Choice("torch", "no engine is faster", {"torch": 7.0, "onnxruntime": 9.0}),
    )
    gain = step_gain(
        planned,
        [
            Use("text_encoder", False, 1, "conditioning"),
            Use("denoiser", False, 4, "rollout"),
            Use("denoiser", False, 4, "tail"),
            Use("vae_encoder", False, 1, "conditioning"),
            Use("denoiser", True, 4, "tail"),
            Use("vae_decoder", True, 1, "decode"),
        ],
    )
    assert gain.torch_ms == pytest.approx(3 + 8 * 10 + 7)
    assert gain.planned_ms == pytest.approx(1 + 8 * 4 + 7)
    assert gain.live_ms == pytest.approx(2 * 4 * 10)
    frozen, whole = step_gain_lines(gain)
    assert "torch 90 ms, planned 40 ms (2.25x)" in frozen
    assert "torch 170 ms, planned 120 ms (1.42x)" in whole


def test_stages_that_are_unused_or_unmeasured_do_not_count() -> None:
    planned = runtime(
        denoiser=Choice("onnxruntime", "fastest", {"torch": 10.0, "onnxruntime": 4.0}),
        image_encoder=Choice("onnxruntime", "fastest", {"torch": 99.0, "onnxruntime": 98.0}),
        vae_encoder=Choice("torch", "no engine"),
    )
    encoder = Use("vae_encoder", False, 1, "conditioning")
    gain = step_gain(planned, [Use("denoiser", False, 2, "rollout"), encoder])
    assert (gain.torch_ms, gain.planned_ms, gain.live_ms) == (20.0, 8.0, 0.0)
    nothing = step_gain(runtime(vae_encoder=Choice("torch", "no engine")), [encoder, replace(encoder, live=True)])
    assert (nothing.torch_ms, nothing.planned_ms, nothing.live_ms) == (0.0, 0.0, 0.0)
    assert step_gain_lines(nothing) == ["no engine was measured on this machine, so the step time cannot be predicted"]


@pytest.mark.parametrize(
    ("backend", "own_ms", "verified", "refused", "note"),
    [
        ("onnxruntime", 4.0, True, False, ""),
        ("openvino", 5.0, True, False, "slower than the selected backend"),
        ("openvino", 3.0, True, False, "not selected"),
        ("openvino", None, True, False, "not selected"),
        ("openvino", 5.0, False, False, "built, not verified here"),
        ("onnxruntime", 4.0, True, True, "refused"),
    ],
)
def test_a_plan_says_why_an_engine_is_not_used(
    backend: str, own_ms: float | None, verified: bool, refused: bool, note: str
) -> None:
    pytest.importorskip(backend)
    latency = {"torch": 9.0} | ({} if own_ms is None else {backend: own_ms})
    manifest = SimpleNamespace(parity=(), latency_ms=latency, verified=verified)
    stored = SimpleNamespace(record=lambda stage, name: SimpleNamespace(manifest=manifest, bytes=1, problem=None))
    choice = Choice("onnxruntime", "fastest", {"torch": 10.0, "onnxruntime": 4.0})
    candidate = _candidate(cast(Runtime, stored), "denoiser", choice, backend, refused)
    assert (candidate.note, candidate.ms) == (note, own_ms)
