"""What `run.json` holds for the report that is in no other file of a run: its stages, versions, machine, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from frostline.runtime.backends import TORCH
from frostline.runtime.runtime import Runtime
from frostline.train.judging.judge import Judge
from frostline.train.loop.evaluation import PSNR, PSNR_ABOUT
from frostline.train.loop.saving import package_versions
from frostline.train.machine import describe_machine
from frostline.train.settings import RunSettings
from frostline.train.step.module import TrainingModule


def run_facts(
    module: TrainingModule, settings: RunSettings, judges: Sequence[Judge] = ()
) -> Callable[[], dict[str, Any]]:
    """Return a function that gives the facts of a run, with the backends chosen until it is called."""
    runtime = module.runtime
    scored = {active.name: active for active in module.rewards} | {judge.name: judge.active for judge in judges}
    fixed = {
        "rewards": [active.name for active in module.rewards],
        "judges": [judge.name for judge in judges],
        "about": {name: active.about for name, active in scored.items()} | {PSNR: PSNR_ABOUT},
        "versions": package_versions(module),
        "machine": describe_machine(module.model.device),
        "changed_settings": [*changed_from_defaults(settings)],
    }
    parity = {name: _parity(runtime, name) for name in runtime.stages}
    return lambda: {"plan": _plan(runtime, parity), **fixed}


def changed_from_defaults(settings: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the names, such as `lora.rank` and `rewards.0.type`, of settings that have no default, or another value."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, BaseModel):
            yield from changed_from_defaults(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(isinstance(entry, BaseModel) for entry in value):
            for number, entry in enumerate(value):
                yield from changed_from_defaults(entry, f"{prefix}{name}.{number}.")
        else:
            yield f"{prefix}{name}"


def _parity(runtime: Runtime, name: str) -> dict[str, float]:
    """The largest difference from PyTorch that was measured of each engine that may serve a stage."""
    choice = runtime.plan[name]
    found = {}
    for backend in {choice.backend, *choice.candidates} - {TORCH}:
        record = runtime.record(name, backend)
        manifest = None if record is None else record.manifest
        if manifest is not None and manifest.parity:
            found[backend] = max(parity.max_abs for parity in manifest.parity)
    return found


def _plan(runtime: Runtime, parity: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Of each stage the backend at the shape that came last, and why each backend was chosen at any shape."""
    plan = {}
    for name, choice in runtime.plan.items():
        reasons = {each.backend: each.reason for each in (*runtime.trials.choices(name), choice)}
        plan[name] = {
            "backend": choice.backend,
            "reason": choice.reason,
            "reasons": reasons,
            "parity": parity.get(name, {}),
        }
    return plan
