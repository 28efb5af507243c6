"""Collect the facts for `run.json` that are in no other file of a run: stages, rewards, versions, machine, and which
settings differ from their defaults.
"""

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
    """Return a function that returns the facts of a run, including the backends chosen so far.

    Args:
        module: the training module.
        settings: the settings of the run.
        judges: the judges of the run.
    """
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
    """Yield the dotted names, such as `lora.rank`, of settings that differ from their default or have no default."""
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
    """Return the largest absolute difference from PyTorch of each candidate engine of a stage, by backend."""
    choice = runtime.plan[name]
    found = {}
    for backend in {choice.backend, *choice.candidates} - {TORCH}:
        record = runtime.record(name, backend)
        manifest = None if record is None else record.manifest
        if manifest is not None and manifest.parity:
            found[backend] = max(parity.max_abs for parity in manifest.parity)
    return found


def _plan(runtime: Runtime, parity: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the backend of each stage at the last shape, and the reasons for all backends chosen at any shape."""
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
