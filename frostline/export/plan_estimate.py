"""What a plan is worth: the candidates of each stage, and the predicted time of a whole training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from frostline.models.wan.denoise_steps import DenoiseSteps
from frostline.rewards.config import RewardConfig
from frostline.runtime.backends import ENGINE_BACKENDS, TORCH, get_backend
from frostline.runtime.planning.plan import Choice
from frostline.runtime.runtime import Runtime


@dataclass(frozen=True)
class Candidate:
    """A backend that could serve a stage. ms and torch_ms come from one interleaved run; None: never measured."""

    backend: str
    ms: float | None
    torch_ms: float | None
    max_abs: float | None
    bytes: int
    note: str


@dataclass(frozen=True)
class StageGain:
    """One stage: who could serve it, who does and why."""

    stage: str
    choice: Choice
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class StepGain:
    """Predicted milliseconds of one step: the frozen part in torch and as planned, and the live part in torch.

    unmeasured: stages that are in none of these.
    """

    torch_ms: float
    planned_ms: float
    live_ms: float
    unmeasured: tuple[str, ...] = ()


def stage_gains(runtime: Runtime) -> list[StageGain]:
    """All stages of the runtime with all backends; engines that are refused serve no more."""
    refused = runtime.check_engines()
    gains = []
    for name, choice in runtime.plan.items():
        engines = (_candidate(runtime, name, backend, (name, backend) in refused) for backend in ENGINE_BACKENDS)
        gains.append(StageGain(name, choice, (_torch_candidate(choice), *engines)))
    return gains


def frozen_uses(steps: DenoiseSteps, rewards: Iterable[RewardConfig] = ()) -> dict[str, int]:
    """How often a step uses each frozen stage when nothing is recalled.

    The denoiser runs the rollout head and the KL reference; rewards say what they use.
    """
    return {
        "text_encoder": 1,
        "image_encoder": 1,
        "vae_encoder": 1,
        "denoiser_high_noise": min(steps.high_noise, steps.mid),
        "denoiser": max(0, steps.mid - steps.high_noise) + steps.tail_with_lora,
        **{stage: uses.frozen for reward in rewards for stage, uses in reward.stage_uses.items()},
    }


def live_uses(steps: DenoiseSteps, rewards: Iterable[RewardConfig] = ()) -> dict[str, int]:
    """How often a step runs each stage forward with gradient: the denoise tail, the decoder, and what rewards say."""
    return {
        "denoiser_high_noise": steps.final + 1 - steps.mid - steps.tail_with_lora,
        "denoiser": steps.tail_with_lora,
        "vae_decoder": 1,
        **{stage: uses.live for reward in rewards for stage, uses in reward.stage_uses.items() if uses.live},
    }


def step_gain(runtime: Runtime, frozen: Mapping[str, int], live: Mapping[str, int]) -> StepGain:
    """The sums over all stages that were measured; the others count nowhere.

    Args:
        frozen, live: how often a step uses each stage without and with gradient.
    """
    torch_ms = planned_ms = live_ms = 0.0
    unmeasured = tuple(name for name, choice in runtime.plan.items() if TORCH not in choice.latency_ms)
    for name, choice in runtime.plan.items():
        latency = choice.latency_ms
        if TORCH not in latency:
            continue
        torch_ms += frozen.get(name, 0) * latency[TORCH]
        planned_ms += frozen.get(name, 0) * latency[choice.backend]
        # All large weights are frozen: backward has the input's gradient alone to compute, as much work as forward.
        live_ms += 2 * live.get(name, 0) * latency[TORCH]
    return StepGain(torch_ms, planned_ms, live_ms, unmeasured)


def _torch_candidate(choice: Choice) -> Candidate:
    ms = choice.latency_ms.get(TORCH)
    return Candidate(TORCH, ms, ms, None, 0, "")


def _candidate(runtime: Runtime, stage: str, backend: str, refused: bool) -> Candidate:
    if reason := get_backend(backend).unavailable():
        return Candidate(backend, None, None, None, 0, reason)
    record = runtime.record(stage, backend)
    if record is None:
        return Candidate(backend, None, None, None, 0, "no engine")
    manifest = record.manifest
    if manifest is None:
        return Candidate(backend, None, None, None, record.bytes, record.problem or "damaged")
    worst = max((parity.max_abs for parity in manifest.parity), default=None)
    served = "slower than the chosen one" if manifest.verified else "built, not verified here"
    note = "refused" if refused else served
    latency = manifest.latency_ms
    return Candidate(backend, latency.get(backend), latency.get(TORCH), worst, record.bytes, note)
