"""The runtime: hands out each frozen stage on the backend that the plan names, and swaps backends on demand."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from frostline.config import AUTO, OTHERS
from frostline.errors import ConfigError, EngineError, ShapeError
from frostline.runtime.advice import export_command
from frostline.runtime.backends import ENGINE_BACKENDS, TORCH, get_backend
from frostline.runtime.clock import StageClock
from frostline.runtime.identity import find_engine, weights_sha256
from frostline.runtime.latency import LatencyNote, machine_id, shape_class, take_turns
from frostline.runtime.manifest import Manifest
from frostline.runtime.plan import Choice, Plan
from frostline.runtime.stage import Network, Runner, Stage
from frostline.runtime.store import EngineRecord, EngineStore
from frostline.runtime.verification import VerifiedEngine

log = logging.getLogger(__name__)

PlanSetting = str | Mapping[str, str]
# Engines by so much slower than the best where they were verified are not tried at other shapes.
_WORTH_A_TRIAL = 2
# What is spent on a comparison at a new shape, beside a first run of each.
_TRIAL_RUNS, _TRIAL_SECONDS = 5, 0.5


class Runtime:
    """Serves frozen stages.

    Args:
        stages: by name.
        plan: `auto` (per stage and shape the fastest verified engine, measured on this machine, torch where none is
            faster), one backend for all stages, or a mapping of stage to backend, of which `*` names the backend of
            the stages that it leaves out (`auto` if not given).
        engines: the engine store; None serves everything from torch.
        strict: raise where an engine fails, instead of falling back to torch.
    Raises:
        ConfigError: the plan names an unknown stage or backend.
        EngineError: `strict`, and an engine that the plan names cannot be had.
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
        self._store = EngineStore(engines) if engines is not None else None
        self._weights: dict[str, str] = {}
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._warned: set[str] = set()
        self._plan: dict[str, Choice] = {}
        self._at_shape: dict[tuple[str, str], Choice] = {}
        self._served: dict[str, Choice] = {}
        self.replan(plan)

    def replan(self, plan: PlanSetting) -> None:
        """Choose anew, for instance after an export; engines that failed before get another chance."""
        wanted = self._expand(plan)
        self._loaded.clear()
        self._at_shape.clear()
        self._served.clear()
        self._plan = {name: self._choose(stage, wanted[name]) for name, stage in self.stages.items()}

    @property
    def plan(self) -> Plan:
        """What serves each stage now; where that depends on the shape, at the one that came last."""
        served = {name: self._served.get(name, choice) for name, choice in self._plan.items() if choice.candidates}
        return Plan({**self._plan, **served})

    def __getitem__(self, stage: str) -> Runner:
        """The stage as a callable that follows the plan, also when it changes later."""
        if stage not in self.stages:
            raise ConfigError(f"there is no stage {stage!r}: this runtime serves {', '.join(self.stages)}")
        return _PlannedRunner(self, stage)

    @contextmanager
    def use(self, **backends: str) -> Iterator[None]:
        """Serve the named stages from other backends within the block, e.g. `use(vae_encoder="torch")`."""
        chosen = {}
        for name, backend in backends.items():
            if name not in self.stages:
                raise ConfigError(f"there is no stage {name!r}: this runtime serves {', '.join(self.stages)}")
            chosen[name] = self._choose(self.stages[name], backend)
        before = {name: self._plan[name] for name in chosen}
        self._plan.update(chosen)
        try:
            yield
        finally:
            self._plan.update(before)

    def check_engines(self) -> set[tuple[str, str]]:
        """Hold the engines that the plan counts on against signatures and hashes, before any of them is loaded.

        One that is refused gives way as it would where it is loaded. Returns stage and backend of each.
        """
        refused = set()
        for name, choice in [*self._plan.items()]:
            for backend in choice.candidates or {choice.backend} - {TORCH}:
                try:
                    self._verified(self.stages[name], backend)
                except EngineError as error:
                    self._give_way(name, backend, error)
                    refused.add((name, backend))
        return refused

    def release_weights(self, *stages: str) -> None:
        """Give back the memory of PyTorch weights that are not needed now; they are read again where they are.

        Args:
            stages: for instance those whose outputs a cache holds; if none is named, those that an engine serves which
                has weights of its own.
        """
        served = [name for name, choice in self._plan.items() if _holds_weights(choice.backend)]
        for name in stages or served:
            if (weights := self.stages[name].weights) is not None:
                weights.release()

    def pending_bytes(self) -> int:
        """Of weights that are not in memory yet, and will be once every stage has run as planned."""
        pending = 0
        for name, choice in self._plan.items():
            stage = self.stages[name]
            if choice.backend == TORCH or not _holds_weights(choice.backend):
                away = stage.weights is not None and not stage.weights.resident
            else:
                away = (name, choice.backend) not in self._loaded
            pending += _weight_bytes(stage) if away else 0
        return pending

    def fingerprint(self, stage: str) -> str:
        """What the stage's outputs depend on, beside its inputs: its weights and the backends that may serve it."""
        choice = self._plan[stage]
        backends = f"{AUTO} {','.join(sorted(choice.candidates))}" if choice.candidates else choice.backend
        return f"{backends} {self._weights_of(stage)}"

    def admits(self, stage: str, inputs: Mapping[str, Tensor]) -> bool:
        """Whether inputs of a stage that is one network, in one call, are of shapes that its backend serves.

        The backend is the one that served the stage last: torch, which serves any, may have won at a shape.
        """
        choice = self._served.get(stage, self._plan[stage])
        if choice.backend == TORCH and (stage in self._served or not choice.candidates):
            return True
        (network,) = self.stages[stage].networks
        return all(spec.admits(inputs[spec.name].shape) for spec in network.inputs)

    def run(self, stage: str, inputs: Mapping[str, Tensor], use: str | None = None) -> dict[str, Tensor]:
        """Run one stage as planned; a failing engine is replaced by torch, with one warning.

        Args:
            use: what the clock is to call it; the stage's name if not given.
        """
        backend = self._backend_at(stage, inputs)
        with torch.no_grad(), self.clock.measure(use or stage, backend):
            try:
                return self._load(stage, backend).whole(**inputs)
            except Exception as error:
                self._give_way(stage, backend, error)
                return self._load(stage, TORCH).whole(**inputs)

    def networks_at(self, stage: str, inputs: Mapping[str, Tensor]) -> tuple[str, dict[str, Runner]]:
        """The backend that serves inputs of these shapes, and the stage's networks on it, by name.

        For who puts the stage together in another way. They do not keep time. Where an engine fails, torch computes
        that network and all that are called after it, with one warning.
        """
        backend = serving = self._backend_at(stage, inputs)

        def run(name: str, /, **tensors: Tensor) -> dict[str, Tensor]:
            nonlocal serving
            with torch.no_grad():
                try:
                    return self._load(stage, serving).networks[name](**tensors)
                except Exception as error:
                    self._give_way(stage, serving, error)
                    serving = TORCH
                    return self._load(stage, TORCH).networks[name](**tensors)

        return backend, {network.name: partial(run, network.name) for network in self.stages[stage].networks}

    def _expand(self, plan: PlanSetting) -> dict[str, str]:
        if isinstance(plan, str):
            return dict.fromkeys(self.stages, plan)
        if unknown := sorted(plan.keys() - self.stages.keys() - {OTHERS}):
            raise ConfigError(f"plan: there is no stage {unknown[0]!r}, only {', '.join(self.stages)}")
        return {name: plan.get(name, plan.get(OTHERS, AUTO)) for name in self.stages}

    def _choose(self, stage: Stage, wanted: str) -> Choice:
        if wanted == AUTO:
            return self._fastest(stage)
        if wanted == TORCH:
            return Choice(TORCH, "as asked")
        get_backend(wanted)
        record = self.record(stage.name, wanted)
        manifest = record.manifest if record else None
        if manifest is None:
            reason = f"no engine of {stage.name} for {wanted}: build it with `{export_command(stage.name, wanted)}`"
        elif doubt := _doubt(stage, manifest):
            reason = f"the {wanted} engine of {stage.name} is {doubt}"
        else:
            return Choice(wanted, "as asked", manifest.latency_ms)
        if self.strict:
            raise EngineError(reason)
        log.warning("%s; torch serves it meanwhile", reason)
        return Choice(TORCH, reason)

    def _fastest(self, stage: Stage) -> Choice:
        if self._store is None:
            return Choice(TORCH, "no engine store")
        candidates: dict[str, Manifest] = {}
        for backend in ENGINE_BACKENDS:
            record = self.record(stage.name, backend)
            manifest = record.manifest if record else None
            if manifest and not _doubt(stage, manifest) and {backend, TORCH} <= manifest.latency_ms.keys():
                candidates[backend] = manifest
        if not candidates:
            return Choice(TORCH, f"no verified engine: `{export_command(stage.name, ENGINE_BACKENDS[0])}`")
        # Latencies come from different runs: what compares is the ratio to torch in the same run.
        gains = {name: manifest.latency_ms[TORCH] / manifest.latency_ms[name] for name, manifest in candidates.items()}
        best = max(gains, key=lambda backend: gains[backend])
        backend = best if gains[best] > 1 else TORCH
        here = machine_id(stage.networks[0].device)
        if any(manifest.measured_on != here for manifest in candidates.values()):
            reason = f"as {candidates[best].measured_on or 'another machine'} has it; this one decides at first use"
            return Choice(backend, reason, {}, tuple(candidates))
        worth = tuple(name for name, gain in gains.items() if _WORTH_A_TRIAL * gain >= max(1, gains[best]))
        reason = f"{gains[best]:.2f}x as fast as torch" if gains[best] > 1 else f"{best} is slower ({gains[best]:.2f}x)"
        return Choice(backend, reason, candidates[best].latency_ms, worth)

    def _backend_at(self, stage: str, inputs: Mapping[str, Tensor]) -> str:
        """The backend that serves inputs of these shapes."""
        choice = self._plan[stage]
        if not choice.candidates:
            return choice.backend
        shape = shape_class(inputs)
        if (stage, shape) not in self._at_shape:
            self._at_shape[stage, shape] = self._fastest_at(self.stages[stage], choice, shape, inputs)
        self._served[stage] = self._at_shape[stage, shape]
        return self._served[stage].backend

    @torch.no_grad()
    def _fastest_at(self, stage: Stage, choice: Choice, shape: str, inputs: Mapping[str, Tensor]) -> Choice:
        """Measured, or recalled from an earlier run on this machine."""
        if stage.weights is not None and not stage.weights.resident:
            return choice  # to read them for a comparison costs more than it could gain
        if _several_processes():
            return choice  # a stage in shards runs in all processes at once: they have to choose alike
        records = {backend: self.record(stage.name, backend) for backend in choice.candidates}
        contenders = {backend: record.id.key for backend, record in records.items() if record is not None}
        note = LatencyNote(stage.name, {**contenders, TORCH: TORCH}, shape, stage.networks[0].device)
        latency_ms = note.read()
        if latency_ms is None:
            runners = {TORCH: stage.torch, **self._able(stage, choice.candidates, inputs)}
            if len(runners) == 1:
                return Choice(TORCH, "no engine serves this shape")
            log.info("stage %s: timing %s at %s", stage.name, ", ".join(runners), shape)
            latency_ms = take_turns(runners, inputs, _TRIAL_RUNS, _TRIAL_SECONDS)
            if runners.keys() == contenders.keys() | {TORCH}:
                latency_ms = note.write(latency_ms)
        best = min(latency_ms, key=lambda backend: latency_ms[backend])
        self._forget_engines(
            stage.name, {best, *(c.backend for (name, _), c in self._at_shape.items() if name == stage.name)}
        )
        if best == TORCH:
            rival = min(latency_ms.keys() - {TORCH}, key=lambda backend: latency_ms[backend])
            gain = latency_ms[TORCH] / latency_ms[rival]
            return Choice(TORCH, f"{rival} is slower at this shape ({gain:.2f}x)", latency_ms)
        return Choice(best, f"{latency_ms[TORCH] / latency_ms[best]:.2f}x as fast as torch at this shape", latency_ms)

    def _able(self, stage: Stage, backends: Iterable[str], inputs: Mapping[str, Tensor]) -> dict[str, Runner]:
        """Those of the engines that load, and run on these inputs."""
        able = {}
        for backend in backends:
            try:
                runner = self._load(stage.name, backend).whole
                runner(**inputs)
            except Exception as error:
                self._give_way(stage.name, backend, error)
            else:
                able[backend] = runner
        return able

    def _do_without(self, stage: str, backend: str, error: Exception) -> None:
        """Serve a stage from now on with what is left: the other candidates, if there are any, and torch."""
        rest = tuple(name for name in self._plan[stage].candidates if name != backend)
        left = " or ".join((*rest, TORCH))
        log.warning("stage %s: backend %s failed, %s serves it from now on (%s)", stage, backend, left, error)
        self._plan[stage] = Choice(rest[0] if rest else TORCH, f"{backend} failed: {error}", {}, rest)
        self._at_shape = {key: choice for key, choice in self._at_shape.items() if key[0] != stage}
        self._served.pop(stage, None)

    def _forget_engines(self, stage: str, needed: set[str]) -> None:
        """Give the memory of engines back that lost wherever they were tried."""
        for name, backend in [*self._loaded]:
            if name == stage and backend not in needed:
                del self._loaded[name, backend]

    def record(self, stage: str, backend: str) -> EngineRecord | None:
        """The engine of a stage on a backend, if one was built for these weights, shapes and this machine."""
        if self._store is None or get_backend(backend).unavailable():
            return None
        return find_engine(self._store, self.stages[stage], backend, self._weights_of(stage))

    def _weights_of(self, stage: str) -> str:
        if stage not in self._weights:
            self._weights[stage] = weights_sha256(self.stages[stage])
        return self._weights[stage]

    def _load(self, name: str, backend: str) -> _Loaded:
        stage = self.stages[name]
        if not _holds_weights(backend):
            stage.restore_weights()
        if backend == TORCH:
            return _Loaded({network.name: _in_torch(network) for network in stage.networks}, stage.torch)
        if (name, backend) not in self._loaded:
            networks = self._load_engine(stage, backend)
            self._loaded[name, backend] = _Loaded(networks, stage.assemble(networks))
        return self._loaded[name, backend]

    def _verified(self, stage: Stage, backend: str) -> VerifiedEngine:
        record = self.record(stage.name, backend)
        if self._store is None or record is None:
            raise EngineError(f"no engine: build it with `{export_command(stage.name, backend)}`")
        return self._store.verify(record)

    def _load_engine(self, stage: Stage, backend: str) -> Mapping[str, Runner]:
        engine = self._verified(stage, backend)
        if not engine.manifest.verified:
            raise EngineError(
                f"engine {engine.path} was built but never compared with PyTorch: "
                "`frostline plan MODEL` does so on this machine"
            )
        networks = {network.name: network for network in stage.networks}
        return get_backend(backend).load(engine, networks, stage.networks[0].device)

    def _give_way(self, stage: str, backend: str, error: Exception) -> None:
        """Let torch have what a backend failed at: this shape, or from now on; raises where it may not."""
        if backend == TORCH or self.strict:
            raise error
        if isinstance(error, ShapeError):
            self._warn_once(f"stage {stage}: torch serves this shape ({error})")
        else:
            self._do_without(stage, backend, error)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


@dataclass(frozen=True)
class _Loaded:
    """A stage on one backend, and the networks that it is made of."""

    networks: Mapping[str, Runner]
    whole: Runner


def _in_torch(network: Network) -> Runner:
    return lambda **inputs: network.reference(inputs)


@dataclass(frozen=True)
class _PlannedRunner:
    runtime: Runtime
    stage: str

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.runtime.run(self.stage, inputs)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _weight_bytes(stage: Stage) -> int:
    if stage.weights is not None:
        return stage.weights.nbytes
    parameters = (p for network in stage.networks for p in network.module.parameters())
    return sum({id(parameter): parameter.nbytes for parameter in parameters}.values())


def _holds_weights(backend: str) -> bool:
    return backend != TORCH and get_backend(backend).HOLDS_WEIGHTS


def _doubt(stage: Stage, manifest: Manifest) -> str | None:
    """Why an engine may not serve here, or None."""
    obstacle = get_backend(manifest.backend).obstacle(stage.networks[0].device, manifest.device)
    if obstacle:
        return f"built, not verified here: {obstacle}"
    return None if manifest.verified else "unverified: `frostline plan MODEL` compares it with PyTorch"
