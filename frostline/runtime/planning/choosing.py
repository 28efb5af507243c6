"""Choose the backend of a stage from the engines in the store and their measured latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from frostline.config import AUTO
from frostline.runtime.backends import DEFAULT_BACKEND, TORCH, backend_names, get_backend
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.store import EngineRecord
from frostline.runtime.hints import export_command
from frostline.runtime.planning.autotune import machine_id
from frostline.runtime.planning.plan import Choice
from frostline.runtime.stage import Stage

FindRecord = Callable[[str], EngineRecord | None]
# An engine that is slower than the fastest by this factor when verified is not timed at other shapes.
_WORTH_A_TRIAL = 2
# A smaller gain is within the variation of a few runs; PyTorch, the reference, is then used.
_LEAST_GAIN = 1.05


def choose(stage: Stage, wanted: str, find: FindRecord | None) -> Choice:
    """Choose the backend of a stage according to a plan; torch, with the reason, if the requested backend is not
    available.

    Args:
        wanted: `auto`, or the name of a backend.
        find: returns the engine of this stage for a backend; None if there is no store.
    Raises:
        ConfigError: there is no such backend.
    """
    if wanted == AUTO:
        return Choice(TORCH, "no engine store") if find is None else _fastest(stage, find)
    if wanted == TORCH:
        return Choice(TORCH, "as requested")
    get_backend(wanted)
    record = find(wanted) if find is not None else None
    manifest = record.manifest if record else None
    if manifest is None:
        command = export_command(stage.name, wanted)
        return Choice(TORCH, f"no engine of {stage.name} for {wanted}: build it with `{command}`")
    if rejection := _rejection_reason(stage, manifest):
        return Choice(TORCH, f"the {wanted} engine of {stage.name} is {rejection}")
    return Choice(wanted, "as requested", manifest.latency_ms)


def _fastest(stage: Stage, find: FindRecord) -> Choice:
    candidates: dict[str, Manifest] = {}
    for backend in backend_names():
        record = find(backend)
        manifest = record.manifest if record else None
        if manifest and not _rejection_reason(stage, manifest) and {backend, TORCH} <= manifest.latency_ms.keys():
            candidates[backend] = manifest
    if not candidates:
        return Choice(TORCH, f"no verified engine: build one with `{export_command(stage.name, DEFAULT_BACKEND)}`")
    # Latencies come from different runs: only their ratio to torch in the same run is comparable.
    gains = {name: manifest.latency_ms[TORCH] / manifest.latency_ms[name] for name, manifest in candidates.items()}
    best = max(gains, key=lambda backend: gains[backend])
    backend = best if gains[best] >= _LEAST_GAIN else TORCH
    here = machine_id(stage.networks[0].device)
    if any(manifest.measured_on != here for manifest in candidates.values()):
        reason = (
            f"as measured on {candidates[best].measured_on or 'another machine'}; timed on this machine at first use"
        )
        return Choice(backend, reason, {}, tuple(candidates))
    worth = tuple(name for name, gain in gains.items() if _WORTH_A_TRIAL * gain >= max(1, gains[best]))
    return Choice(backend, _reason(best, gains[best]), candidates[best].latency_ms, worth)


def fastest_of(latency_ms: Mapping[str, float]) -> Choice:
    """Return the fastest of the backends that were timed at one shape; torch if no gain is large enough."""
    best = min(latency_ms.keys() - {TORCH}, key=lambda backend: latency_ms[backend])
    gain = latency_ms[TORCH] / latency_ms[best]
    return Choice(best if gain >= _LEAST_GAIN else TORCH, _reason(best, gain, " at this shape"), latency_ms)


def _reason(engine: str, gain: float, where: str = "") -> str:
    if gain >= _LEAST_GAIN:
        return f"{gain:.2f}x as fast as torch{where}"
    return f"{engine} is {'hardly faster' if gain > 1 else 'slower'}{where} ({gain:.2f}x)"


def _rejection_reason(stage: Stage, manifest: Manifest) -> str | None:
    """Return why an engine cannot be used on this machine, or None."""
    obstacle = get_backend(manifest.backend).obstacle(stage.networks[0].device, manifest.device)
    if obstacle:
        return f"built, not verified here: {obstacle}"
    return None if manifest.verified else "not verified: `frostline plan MODEL` compares it with PyTorch"
