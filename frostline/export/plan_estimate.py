"""Estimate a plan: the candidate backends of each stage, and the predicted time of a training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from frostline.runtime.backends import TORCH, backend_names, get_backend
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.planning.plan import Choice
from frostline.runtime.runtime import Runtime
from frostline.stages.provider import Use


@dataclass(frozen=True)
class Candidate:
    """A backend of a stage, with its latency and that of torch in milliseconds from one interleaved run.

    Attributes:
        ms, torch_ms: None if not measured.
        max_abs: largest absolute error; None if not measured.
        bytes: disk space of the engine; 0 without an engine.
        note: why it is not used; empty for the selected backend and for torch.
    """

    backend: str
    ms: float | None
    torch_ms: float | None
    max_abs: float | None
    bytes: int
    note: str


@dataclass(frozen=True)
class StageGain:
    """One stage: the candidate backends, the chosen one and the reason."""

    stage: str
    choice: Choice
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class StepGain:
    """Predicted milliseconds of one step: the frozen part in torch and as planned, and the live part in torch.

    Attributes:
        unmeasured: stages that are not included, because they were not measured.
    """

    torch_ms: float
    planned_ms: float
    live_ms: float
    unmeasured: tuple[str, ...] = ()


def stage_gains(runtime: Runtime) -> list[StageGain]:
    """Return all stages of the runtime with all backends; a note marks rejected engines of the plan."""
    refused = runtime.check_engines()
    gains = []
    for name, choice in runtime.plan.items():
        engines = (_candidate(runtime, name, choice, each, (name, each) in refused) for each in backend_names())
        gains.append(StageGain(name, choice, (_torch_candidate(choice), *engines)))
    return gains


def step_gain(runtime: Runtime, uses: Sequence[Use]) -> StepGain:
    """Return the sums over all measured stages.

    Args:
        uses: uses of stages in a step without cached outputs.
    """
    frozen, live = (Counter[str](), Counter[str]())
    for use in uses:
        (live if use.live else frozen)[use.stage] += use.count
    torch_ms = planned_ms = live_ms = 0.0
    unmeasured = tuple(name for name, choice in runtime.plan.items() if TORCH not in choice.latency_ms)
    for name, choice in runtime.plan.items():
        latency = choice.latency_ms
        if TORCH not in latency:
            continue
        torch_ms += frozen[name] * latency[TORCH]
        planned_ms += frozen[name] * latency[choice.backend]
        # All large weights are frozen: backward only computes the gradient of the input, which takes as long as
        # forward.
        live_ms += 2 * live[name] * latency[TORCH]
    return StepGain(torch_ms, planned_ms, live_ms, unmeasured)


def _torch_candidate(choice: Choice) -> Candidate:
    ms = choice.latency_ms.get(TORCH)
    return Candidate(TORCH, ms, ms, None, 0, "")


def _candidate(runtime: Runtime, stage: str, choice: Choice, backend: str, refused: bool) -> Candidate:
    if reason := get_backend(backend).unavailable():
        return Candidate(backend, None, None, None, 0, reason)
    record = runtime.record(stage, backend)
    if record is None:
        return Candidate(backend, None, None, None, 0, "no engine")
    manifest = record.manifest
    if manifest is None:
        return Candidate(backend, None, None, None, record.bytes, record.problem or "damaged")
    worst = max((parity.max_abs for parity in manifest.parity), default=None)
    latency, note = manifest.latency_ms, "refused" if refused else _why_unused(manifest, choice, backend)
    return Candidate(backend, latency.get(backend), latency.get(TORCH), worst, record.bytes, note)


def _why_unused(manifest: Manifest, choice: Choice, backend: str) -> str:
    if not manifest.verified:
        return "built, not verified here"
    if backend == choice.backend:
        return ""
    own, selected = manifest.latency_ms.get(backend), {**manifest.latency_ms, **choice.latency_ms}.get(choice.backend)
    slower = own is not None and selected is not None and own > selected
    return "slower than the selected backend" if slower else "not selected"
