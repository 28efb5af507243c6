"""The runtime: run each frozen stage on the backend that the plan selects, and switch backends on demand.

Before an engine is used, the stage's modules are compared with the state that the engine was bound to
(`runtime/guard.py`), so that it never computes with outdated weights, adapters or switches.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from frostline.config import AUTO
from frostline.errors import ConfigError, EngineError, EngineMemoryError, InputError, ShapeError
from frostline.runtime.agreement import disagreement, several_processes
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.engines.store import EngineRecord, EngineStore
from frostline.runtime.guard import LiveGuard
from frostline.runtime.identity.digests import WeightDigests
from frostline.runtime.identity.fingerprint import find_engine
from frostline.runtime.loaded import LoadedEngines, LoadedStage, holds_weights, weight_bytes
from frostline.runtime.planning.choosing import FindRecord, choose
from frostline.runtime.planning.plan import Choice, Plan, PlanSetting, expand_plan
from frostline.runtime.planning.trials import Trials
from frostline.runtime.stage import Case, Runner, Stage, Tensors
from frostline.runtime.stage_timer import StageClock

log = logging.getLogger(__name__)


class Runtime:
    """Run frozen stages; thread-safe.

    Engines run concurrently if their backend allows it. PyTorch computes one stage at a time: diffsynth's VAE keeps
    caches in its modules, and a LoRA is disabled in place for the KL reference. `use` and `replan` affect all threads.
    A deep copy contains copies of the stages with their own weights, and loads its engines again.

    Args:
        stages: by name.
        plan: `auto` (the fastest verified engine for each stage and shape, measured on this machine; torch if none is
            faster), one backend for all stages, or a mapping of stage to backend, in which `*` is the backend of all
            other stages (`auto` if not given).
        engines: the folder of the engine store; if None, all stages run on torch.
        strict: raise if an engine fails, instead of falling back to torch.
    Raises:
        ConfigError: the plan names an unknown stage or backend.
        EngineError: `strict`, and an engine that the plan names is not available.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        plan: PlanSetting = AUTO,
        engines: Path | None = None,
        strict: bool = False,
    ) -> None:
        self.stages = dict(stages)
        self.strict = strict
        self.clock = StageClock()
        # Stages whose outputs are all cached: they do not run, so nothing is prepared or loaded for them.
        self.idle: frozenset[str] = frozenset()
        self._store = EngineStore(engines) if engines is not None else None
        # Held while backends are chosen, timed and loaded, never while a call computes; acquired before the other lock.
        self._lock = threading.RLock()
        self._torch_lock = threading.RLock()
        self._digests = WeightDigests(self.stages)
        self._live_guards: dict[str, LiveGuard] = {}
        self._engines = LoadedEngines(self.stages, self._store, self.record)
        self.trials = Trials(self._engines, self.record, self._torch_lock, self._blame)
        self._wanted: dict[str, str] = {}
        self._warned: set[str] = set()
        self._plan: dict[str, Choice] = {}
        self.replan(plan)

    def replan(self, plan: PlanSetting) -> None:
        """Choose the backends again, for example after an export; engines that failed before are tried again.

        Weights are hashed again, which detects the changes that `WeightGuard` cannot detect. Errors: see `Runtime`.
        """
        wanted = expand_plan(plan, self.stages)
        with self._lock:
            self._live_guards.clear()
            self._digests.forget()
            for name in self.stages:
                self._engines.unload(name)
                self.trials.forget(name)
            self._wanted = wanted
            self._plan = {name: self._choose(name, wanted[name]) for name in self.stages}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a runtime with copies of the stages and the same engine store; engines are loaded again."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        with self._lock:
            plan, wanted, engines = dict(self._plan), dict(self._wanted), self._store and self._store.root
            copied.__init__(copy.deepcopy(self.stages, memo), TORCH, engines, self.strict)
            copied._wanted, copied._plan, copied.idle = wanted, plan, self.idle
            copied._digests = self._digests.copied(copied.stages)
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Runtime contains engines of this process and cannot be pickled: save the adapter "
            "with `module.save_adapter(folder)`, and load model and adapter in the other process"
        )

    @property
    def plan(self) -> Plan:
        """Return the current backend of each stage; if it depends on the shape, for the latest shape."""
        latest = {name: self.trials.latest(name) or choice for name, choice in self._plan.items() if choice.candidates}
        return Plan({**self._plan, **latest})

    def __getitem__(self, stage: str) -> Runner:
        """Return the stage as a callable that follows the plan, including later changes."""
        if stage not in self.stages:
            raise ConfigError(f"there is no stage {stage!r}; valid stages: {', '.join(self.stages)}")
        return _PlannedRunner(self, stage)

    @contextmanager
    def use(self, **backends: str) -> Iterator[None]:
        """Run the named stages on other backends within the block, e.g. `use(vae_encoder="torch")`."""
        with self._lock:
            chosen = {}
            for name, backend in backends.items():
                if name not in self.stages:
                    raise ConfigError(f"there is no stage {name!r}; valid stages: {', '.join(self.stages)}")
                chosen[name] = self._choose(name, backend)
            before = {name: (self._plan[name], self._wanted[name]) for name in chosen}
            self._plan |= chosen
            self._wanted |= backends
        try:
            yield
        finally:
            with self._lock:
                self._plan |= {name: choice for name, (choice, _) in before.items()}
                self._wanted |= {name: wanted for name, (_, wanted) in before.items()}

    def check_engines(self) -> set[tuple[str, str]]:
        """Check signatures and hashes of all engines in the plan; return (stage, backend) of each rejected one.

        A rejected engine is replaced by another backend, as when an engine cannot be loaded.
        """
        refused = set()
        for name, choice in [*self._plan.items()]:
            for backend in choice.candidates or {choice.backend} - {TORCH}:
                try:
                    self._engines.verify(name, backend)
                except EngineError as error:
                    self._blame(name, backend, error)
                    refused.add((name, backend))
        return refused

    def release_weights(self, *stages: str, engines: bool = False) -> None:
        """Release PyTorch weights that are not needed now; they are read again at the next use.

        Args:
            stages: for example those with cached outputs; if empty, those that run on an engine with its own weights.
            engines: also release the engines of `stages`.
        """
        for name in stages or [name for name, choice in self._plan.items() if holds_weights(choice.backend)]:
            if engines:
                with self._lock:
                    self._engines.unload(name)
            if (weights := self.stages[name].weights) is not None:
                weights.release()

    def pending_bytes(self) -> int:
        """Return the size of weights that are not in memory yet but will be once every stage has run as planned."""
        pending = 0
        for name, choice in ((name, choice) for name, choice in self._plan.items() if name not in self.idle):
            stage = self.stages[name]
            if choice.backend == TORCH or not holds_weights(choice.backend):
                away = stage.weights is not None and not stage.weights.resident
            else:
                away = (name, choice.backend) not in self._engines
            pending += weight_bytes(stage) if away else 0
        return pending

    def fingerprint(self, stage: str) -> str:
        """Return an id of the weights and the possible backends; the outputs also depend on code and inputs."""
        weights = self._weights_of(stage)
        choice = self._plan[stage]
        backends = f"{AUTO} {','.join(sorted(choice.candidates))}" if choice.candidates else choice.backend
        return f"{backends} {weights}"

    def admits(self, stage: str, inputs: Tensors) -> bool:
        """Return whether the backend of a stage with one network supports inputs of these shapes in one call.

        The backend is the one last used for the stage, or at first an engine of the plan; torch supports any shape.
        """
        latest = self.trials.latest(stage)
        choice = latest or self._plan[stage]
        if choice.backend == TORCH and (latest is not None or not choice.candidates):
            return True
        (network,) = self.stages[stage].networks
        return all(spec.admits(inputs[spec.name].shape) for spec in network.inputs if spec.name in inputs)

    def run(
        self, stage: str, inputs: Tensors, *, variant: str | None = None, use: str | None = None
    ) -> dict[str, Tensor]:
        """Run a stage as planned; if an engine fails on inputs that PyTorch accepts, use torch and log one warning.

        Args:
            variant: one of the stage's variants; None runs the modules as they are.
            use: name of this use in the timings; the stage's name by default.
        Raises:
            EngineError: `strict`, and an engine failed or does not match the state of the modules; or the weights are
                sharded over processes, and an engine failed in this process: the others would wait for it forever.
        """
        case = Case(inputs, variant)
        backend = self._backend_at(stage, case)
        with torch.no_grad(), self.clock.measure(use or stage, backend):
            outputs, _ = self._compute(stage, backend, lambda loaded: loaded.run(*case))
            return outputs

    def networks_at(self, stage: str, inputs: Tensors) -> tuple[str, dict[str, Runner]]:
        """Return the backend for inputs of these shapes, and the stage's networks on it, by name; calls are not timed.

        If an engine fails, torch computes that network and all that are called after it, and one warning is logged.
        """
        case = Case(inputs)
        backend = serving = self._backend_at(stage, case)

        def run(name: str, /, **tensors: Tensor) -> dict[str, Tensor]:
            nonlocal serving
            if serving != TORCH and self._backend_at(stage, case) != serving:
                serving = TORCH
            with torch.no_grad():
                outputs, serving = self._compute(stage, serving, lambda loaded: loaded.networks[name](**tensors))
            return outputs

        return backend, {network.name: partial(run, network.name) for network in self.stages[stage].networks}

    def agree_across_processes(self) -> None:
        """Load the engines that the plan names; an engine that fails in one process is dropped in all processes.

        A collective call, to be made before weights are sharded: later, a process that falls back to torch alone would
        deadlock. If the plans of the processes differ, each drops its engine until all have the same backend. If
        `strict`, a failure or a difference raises an EngineError.
        """
        for name in [name for name in self.stages if name not in self.idle] if several_processes() else ():
            backend = self._plan[name].backend
            while reason := disagreement(backend, partial(self._load, name, backend) if backend != TORCH else None):
                error = EngineError(reason)
                if self.strict:
                    raise error
                if backend != TORCH:
                    self._drop_candidate(name, backend, error)
                backend = self._plan[name].backend

    def _choose(self, name: str, wanted: str) -> Choice:
        choice = choose(self.stages[name], wanted, self._finder(name))
        if choice.backend == TORCH and wanted not in (AUTO, TORCH):
            if self.strict:
                raise EngineError(choice.reason)
            log.warning("%s; using torch in the meantime", choice.reason)
        return choice

    def _finder(self, name: str) -> FindRecord | None:
        return None if self._store is None else partial(self.record, name)

    def _backend_at(self, stage: str, case: Case) -> str:
        """Return the backend for inputs of these shapes and the current state of the stage's modules."""
        with self._lock:
            if self._wanted[stage] == TORCH or self._store is None:
                return TORCH
            self._weights_of(stage)
            choice = self._plan[stage]
            if choice.backend == TORCH and not choice.candidates:
                return TORCH
            if (reason := self._conflict(stage)) is not None:
                if self.strict:
                    raise EngineError(f"stage {stage}: no engine matches the current state of the module: {reason}")
                self._warn_once(f"stage {stage}: using torch for now: {reason}")
                return TORCH
            if not choice.candidates:
                return choice.backend
            return self.trials.choose(self.stages[stage], choice, case).backend

    def _conflict(self, stage: str) -> str | None:
        """Return why engines do not match the current state of the stage's modules; None if they do."""
        if stage not in self._live_guards:
            self._live_guards[stage] = LiveGuard(self.stages[stage])
        guard = self._live_guards[stage]
        if guard.conflict() is None:
            return None
        with self._torch_lock:
            return guard.conflict()  # another thread may have disabled the LoRA while it held the lock

    def _drop_candidate(self, stage: str, backend: str, error: Exception) -> None:
        """Drop a backend of a stage; from now on the remaining candidates or torch are used."""
        with self._lock:
            plan = self._plan[stage]
            if backend in (plan.backend, *plan.candidates):  # otherwise another thread dropped it first
                self._drop(stage, backend, error)

    def _drop(self, stage: str, backend: str, error: Exception) -> None:
        rest = tuple(name for name in self._plan[stage].candidates if name != backend)
        left = " or ".join((*rest, TORCH))
        log.warning("stage %s: backend %s failed, using %s from now on (%s)", stage, backend, left, error)
        self._plan[stage] = Choice(rest[0] if rest else TORCH, f"{backend} failed: {error}", {}, rest)
        self.trials.forget(stage)

    def record(self, stage: str, backend: str) -> EngineRecord | None:
        """Return the engine of a stage on a backend, if one was built for these weights, shapes and this machine."""
        if self._store is None or get_backend(backend).unavailable():
            return None
        return find_engine(self._store, self.stages[stage], backend, self._weights_of(stage))

    def _weights_of(self, name: str) -> str:
        """Return the digest of a stage's current weights; if they have changed, choose its backend again."""
        with self._lock:
            change = self._digests.update(name)
            if change != "none":
                self._live_guards.pop(name, None)
            if change == "moved":
                self._engines.unload_borrowers(name)
            elif change == "changed" and name in self._plan:
                self._choose_again(name)
            return self._digests[name]

    def _choose_again(self, name: str) -> None:
        """Use engines of the new weights for a stage whose weights have changed, or torch."""
        self._engines.unload(name)
        self.trials.forget(name)
        before = self._plan[name]
        choice = self._plan[name] = choose(self.stages[name], self._wanted[name], self._finder(name))
        had, has = (each.backend != TORCH or bool(each.candidates) for each in (before, choice))
        if had and not has:
            message = f"stage {name}: its weights have changed since its engine was built: {choice.reason}"
            if self.strict:
                raise EngineError(message)
            self._warn_once(f"{message}; using torch in the meantime")

    def _load(self, name: str, backend: str) -> LoadedStage:
        with self._lock:
            return self._engines.load(name, backend)

    def _compute(
        self, stage: str, backend: str, compute: Callable[[LoadedStage], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], str]:
        """Return the outputs of a stage or of one of its networks, and the backend that computed them."""

        def on(backend: str) -> dict[str, Tensor]:
            loaded = self._load(stage, backend)
            with self._torch_lock if backend == TORCH else nullcontext():
                return compute(loaded)

        if backend == TORCH:
            return on(TORCH), TORCH
        try:
            return on(backend), backend
        except Exception as error:
            if self.strict:
                raise
            if self._digests.sharded(stage):
                raise EngineError(
                    f"stage {stage}: backend {backend} failed in one of several processes with sharded "
                    "weights, where a single process cannot fall back to torch: start again with plan "
                    f"{stage}=torch ({error})"
                ) from error
            # Raises if the inputs are invalid or memory runs out, which is not a fault of the engine.
            outputs = on(TORCH)
            self._blame(stage, backend, error)
            return outputs, TORCH

    def _blame(self, stage: str, backend: str, error: Exception) -> None:
        """Choose the backend to use after an engine failed on inputs that PyTorch accepts."""
        if self.strict:
            raise error
        if isinstance(error, InputError):
            what = "shape" if isinstance(error, ShapeError) else "input"
            self._warn_once(f"stage {stage}: using torch for this {what} ({error})")
        elif isinstance(error, EngineMemoryError):
            self._warn_once(f"stage {stage}: backend {backend} ran out of memory, using torch for this call ({error})")
        else:
            self._drop_candidate(stage, backend, error)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


@dataclass(frozen=True)
class _PlannedRunner:
    runtime: Runtime
    stage: str

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.runtime.run(self.stage, inputs)
