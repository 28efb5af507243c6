"""Time the backends of a stage at each new shape, and remember the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from frostline.runtime.agreement import several_processes
from frostline.runtime.backends import TORCH
from frostline.runtime.identity.fingerprint import stage_computation
from frostline.runtime.loaded import FindRecord, LoadedEngines
from frostline.runtime.planning.autotune import LatencyNote, shape_class, take_turns
from frostline.runtime.planning.choosing import fastest_of
from frostline.runtime.planning.plan import Choice
from frostline.runtime.stage import Case, Stage

log = logging.getLogger(__name__)

# Limits of a comparison at a new shape, after one warm-up run of each backend.
_TRIAL_RUNS, _TRIAL_SECONDS = 5, 0.5


class Trials:
    """The fastest backend of each stage at each shape. Not thread-safe.

    Attributes:
        timed: how often backends were timed; shapes that an earlier process timed are not counted.

    Args:
        engines: the engines in memory.
        find: returns the engine of a stage on a backend.
        torch_lock: held while PyTorch computes.
        failed: called with stage, backend and error if an engine fails on inputs that PyTorch accepts; may raise.
    """

    def __init__(
        self,
        engines: LoadedEngines,
        find: FindRecord,
        torch_lock: AbstractContextManager[object],
        failed: Callable[[str, str, Exception], None],
    ) -> None:
        self._engines = engines
        self._find = find
        self._torch_lock = torch_lock
        self._failed = failed
        self.timed = 0
        self._at_shape: dict[tuple[str, str], Choice] = {}
        self._latest: dict[str, Choice] = {}

    def latest(self, name: str) -> Choice | None:
        """Return the backend that was last used for a stage; None before the first choice."""
        return self._latest.get(name)

    def choices(self, name: str) -> list[Choice]:
        """Return the choices of a stage at all shapes so far."""
        return [choice for (stage, _), choice in self._at_shape.items() if stage == name]

    def choose(self, stage: Stage, planned: Choice, case: Case) -> Choice:
        """Return the backend for the shapes of `case`: the fastest of the planned candidates and torch."""
        shape = shape_class(case.inputs)
        if (stage.name, shape) not in self._at_shape:
            self._at_shape[stage.name, shape] = self._fastest(stage, planned, shape, case)
        self._latest[stage.name] = self._at_shape[stage.name, shape]
        return self._latest[stage.name]

    def forget(self, name: str) -> None:
        """Discard the choices of a stage, so that its candidates are timed again."""
        self._at_shape = {key: choice for key, choice in self._at_shape.items() if key[0] != name}
        self._latest.pop(name, None)

    @torch.no_grad()
    def _fastest(self, stage: Stage, planned: Choice, shape: str, case: Case) -> Choice:
        """Return the fastest backend, measured now, or read from the user cache of this machine."""
        if stage.weights is not None and not stage.weights.resident:
            return planned  # reading the weights for a comparison would take longer than the possible gain
        if several_processes():
            return planned  # a sharded stage runs in all processes at once, so all must choose the same backend
        records = {backend: self._find(stage.name, backend) for backend in planned.candidates}
        contenders = {backend: record.id.key for backend, record in records.items() if record is not None}
        note = LatencyNote(stage.name, {**contenders, TORCH: stage_computation(stage)}, shape, stage.networks[0].device)
        latency_ms = note.read()
        if latency_ms is None:
            runs = {TORCH: partial(stage.torch, *case), **self._runnable(stage, planned, case)}
            if len(runs) == 1:
                return Choice(TORCH, "no engine supports this shape")
            self.timed += 1
            log.debug("stage %s: timing %s at %s", stage.name, ", ".join(runs), shape)
            with self._torch_lock:
                latency_ms = take_turns(runs, _TRIAL_RUNS, _TRIAL_SECONDS)
            if runs.keys() == contenders.keys() | {TORCH}:
                latency_ms = note.write(latency_ms)
        fastest = fastest_of(latency_ms)
        elsewhere = {choice.backend for (name, _), choice in self._at_shape.items() if name == stage.name}
        self._engines.unload(stage.name, keep={fastest.backend, *elsewhere})
        return fastest

    def _runnable(self, stage: Stage, planned: Choice, case: Case) -> dict[str, Callable[[], object]]:
        """Return the engines that load and run on these inputs."""
        runnable: dict[str, Callable[[], object]] = {}
        for backend in planned.candidates:
            try:
                run = partial(self._engines.load(stage.name, backend).run, *case)
                run()
            except Exception as error:
                with self._torch_lock:
                    stage.torch(*case)  # raises if the inputs are invalid, which is not a fault of the engine
                self._failed(stage.name, backend, error)
            else:
                runnable[backend] = run
        return runnable
