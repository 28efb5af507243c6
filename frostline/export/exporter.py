"""Export a stage: trace, build, sign, load, verify and measure an engine, unless it exists."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.export import ExportedProgram

from frostline.errors import EngineError, EngineMemoryError, InputError, ParityError, ShapeError, SharedFolderError
from frostline.export.limits import check_served, within_limit
from frostline.export.parity import compare
from frostline.export.tracing.trace_cache import Traces
from frostline.runtime.backends import TORCH, backend_names, get_backend
from frostline.runtime.backends.base.backend import Backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.device import compute_capabilities, full_fp32
from frostline.runtime.dynamic_dim import Size
from frostline.runtime.engines import manifest
from frostline.runtime.engines.manifest import EngineId, Manifest
from frostline.runtime.engines.store import Build, EngineStore, VerifiedEngine
from frostline.runtime.identity.fingerprint import find_engine, precision_of, stage_key, weights_sha256
from frostline.runtime.planning.autotune import machine_id, take_turns
from frostline.runtime.stage import Network, Runner, Stage

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

_DEFAULT_OPTIONS = BuildOptions()
_LATENCY_SECONDS = 1.5
_LATENCY_RUNS = 15
_PARITY_SIZES: tuple[Size, ...] = ("opt", "min")
# Differs from seed 0 of the samples, so that adapters and latents have different values.
_LIVE_SEED = 1


@dataclass(frozen=True)
class Exported:
    """One stage on one backend: its manifest, whether this call built it, and the reason if it is not verified."""

    manifest: Manifest
    built: bool
    unverified: str | None = None

    @property
    def worst(self) -> manifest.Parity:
        """Return the measurement with the largest absolute error.

        Raises:
            ValueError: the engine was never compared with PyTorch.
        """
        return max(self.manifest.parity, key=lambda parity: parity.max_abs)


def export_stage(
    stage: Stage,
    backend_name: str,
    store: EngineStore,
    *,
    options: BuildOptions = _DEFAULT_OPTIONS,
    force: bool = False,
    traces: Traces | None = None,
    progress: Progress = lambda step: None,
) -> Exported:
    """Make sure that an engine of `stage` is in the store, verified if this machine can run it.

    An existing engine is kept if its stored parity is within `stage.tolerance`; otherwise parity is measured again.

    Args:
        options: build options of the backend.
        force: rebuild an existing engine.
        traces: traces of this stage, shared by builds for several backends.
        progress: called with a short description of each phase.
    Raises:
        EngineError: the backend is not available, or tracing or building failed, or the engine does not run; see
            `verify_engine_parity` for the engines that are then deleted.
        ParityError: the engine's outputs differ from PyTorch's; it is deleted.
    """
    engine, built = build_stage(
        stage, backend_name, store, options=options, force=force, traces=traces, progress=progress
    )
    if engine.manifest.keeps(stage.tolerance):
        return Exported(engine.manifest, built)
    backend = get_backend(backend_name)
    if obstacle := backend.obstacle(stage.networks[0].device, engine.manifest.device):
        log.info("the %s engine of %s is built, not verified here: %s", backend_name, stage.name, obstacle)
        return Exported(engine.manifest, built, unverified=obstacle)
    progress("verify")
    return Exported(verify_engine_parity(stage, store, engine), built)


def build_stage(
    stage: Stage,
    backend_name: str,
    store: EngineStore,
    *,
    options: BuildOptions = _DEFAULT_OPTIONS,
    force: bool = False,
    traces: Traces | None = None,
    progress: Progress = lambda step: None,
) -> tuple[VerifiedEngine, bool]:
    """Build an engine like `export_stage`, but do not verify it; return it, and whether this call built it.

    Raises:
        EngineError: the backend is not available, or tracing or building failed.
    """
    backend, precision = get_backend(backend_name), precision_of(stage)
    if reason := backend.unavailable():
        raise EngineError(reason)
    if precision not in backend.precisions:
        able = " or ".join(sorted(backend.precisions))
        others = ", ".join(name for name in backend_names() if precision in get_backend(name).precisions)
        raise EngineError(
            f"{backend_name} does not support {precision}: export {stage.name} in {able}, or with one of {others}"
        )
    check_live_shapes(stage)
    weights = weights_sha256(stage)
    key = stage_key(stage, backend_name, precision, weights, options)
    with store.building(EngineId(stage.model, stage.name, backend_name, key)) as build:
        if build.existing is not None and not force:
            check_served(stage, build.existing.manifest, options.asked_maximum)
            return build.existing, False
        return _build_engine(stage, weights, build, options, traces or Traces(), progress), True


def check_live_shapes(stage: Stage) -> None:
    """Check that the shapes of the live tensors are in the range of the engines, before one is built or verified.

    Raises:
        ShapeError: they are not; the message names the tensor, such as a matrix of a LoRA whose rank is out of range.
    """
    for network in stage.networks:
        for spec in network.live_specs:
            if not spec.admits(shape := tuple(network.live[spec.name].shape)):
                raise ShapeError(
                    f"network {network.name}: {spec.name} has shape {shape}, engines support "
                    f"{spec.shape_at('min')} to {spec.shape_at('max')}: choose another LoRA rank"
                )


def all_built(stage: Stage, backend_names: Sequence[str], store: EngineStore, options: BuildOptions) -> bool:
    """Return whether the store has an engine of each backend, so that `build_stage` would not build any."""
    # Computed once for all backends, because it is slow for a large model.
    weights = weights_sha256(stage)
    keys = {name: stage_key(stage, name, precision_of(stage), weights, options) for name in backend_names}
    return all(store.get(EngineId(stage.model, stage.name, name, key)) is not None for name, key in keys.items())


def verify_engine_parity(stage: Stage, store: EngineStore, engine: VerifiedEngine) -> Manifest:
    """Compare an engine with PyTorch, time both, and write the results to its manifest.

    This machine must be able to run the engine (`Backend.obstacle`). Live tensors get random values during the
    comparison; their own values are restored afterwards.

    Raises:
        EngineError: the engine cannot be loaded or run. It is deleted, unless the cause was memory, a range of shapes
            that excludes this LoRA, or a folder that other users can write to: these are not faults of the engine.
        ParityError: the engine's outputs differ from PyTorch's; it is deleted.
    """
    backend = engine.manifest.backend
    check_live_shapes(stage)
    stage.restore_weights()
    networks = {network.name: network for network in stage.networks}
    try:
        runners = get_backend(backend).load(engine, networks, stage.networks[0].device)
        with full_fp32(), _random_live(stage):
            parity = _parity(stage, runners)
    except EngineError as error:
        if isinstance(error, InputError | EngineMemoryError | SharedFolderError):
            raise
        _discard(store, engine)
        raise EngineError(
            f"the {backend} engine of {stage.name} does not run: {error}. The engine was deleted."
        ) from error
    if failed := [measured for measured in parity if not measured.passed]:
        _discard(store, engine)
        raise ParityError(_explain(stage, backend, failed))
    timed = next(iter(stage.cases().values()))
    updated = engine.manifest.updated(
        parity=tuple(parity),
        latency_ms=take_turns(
            {TORCH: partial(stage.torch, *timed), backend: partial(stage.run, runners, *timed)},
            _LATENCY_RUNS,
            _LATENCY_SECONDS,
        ),
        measured_on=machine_id(stage.networks[0].device),
        tolerance=stage.tolerance,
        verified=True,
    )
    return store.update(engine, updated).manifest


def ensure_verified(stages: Iterable[Stage], store: EngineStore) -> list[Manifest]:
    """Verify engines of `stages` that this machine can run, but that were built on a machine that could not.

    Call this before creating a `Runtime`, which does not use unverified engines. An engine that fails is deleted (see
    `verify_engine_parity`): otherwise every start would hash the weights to try it again.
    """
    verified = []
    # Hashing a large model's weights takes a while, so it is done only for the stages concerned.
    for stage in (stage for stage in stages if _awaits_verification(stage, store)):
        weights = weights_sha256(stage)
        for backend in (name for name in backend_names() if not get_backend(name).unavailable()):
            record = find_engine(store, stage, backend, weights)
            known = record.manifest if record else None
            if record is None or known is None or known.verified:
                continue
            if get_backend(backend).obstacle(stage.networks[0].device, known.device):
                continue
            try:
                verified.append(verify_engine_parity(stage, store, store.verify(record)))
            except EngineError as error:
                log.warning("%s", error)
    return verified


def _awaits_verification(stage: Stage, store: EngineStore) -> bool:
    """Return whether any engine of the stage's name is not verified, although this machine can run it."""
    manifests = (record.manifest for record in store.find(stage.model, stage.name))
    return any(
        not manifest.verified
        and not get_backend(manifest.backend).unavailable()
        and get_backend(manifest.backend).obstacle(stage.networks[0].device, manifest.device) is None
        for manifest in manifests
        if manifest is not None
    )


def _build_engine(
    stage: Stage, weights: str, build: Build, options: BuildOptions, traces: Traces, progress: Progress
) -> VerifiedEngine:
    backend = get_backend(build.id.backend)
    target = backend.target(stage.networks[0].device, options)
    start = time.monotonic()
    stage.restore_weights()
    networks = [
        _build_network(
            stage,
            network,
            within_limit(network, build.id.backend, backend.largest_tensor, options.asked_maximum),
            *(backend, build, options, traces, progress),
        )
        for network in stage.networks
    ]
    return build.commit(
        Manifest(
            **vars(build.id),
            precision=precision_of(stage),
            weights_sha256=weights,
            opset=options.opset if backend.source == "onnx" else None,
            networks=tuple(networks),
            versions={"torch": torch.__version__, build.id.backend: backend.version()},
            device=target,
            compute_capabilities=compute_capabilities(target),
            build_seconds=time.monotonic() - start,
            tolerance=stage.tolerance,
        )
    )


def _build_network(
    stage: Stage,
    network: Network,
    served: Network,
    backend: Backend,
    build: Build,
    options: BuildOptions,
    traces: Traces,
    progress: Progress,
) -> manifest.NetworkRecord:
    """Build one network; the engine supports the range of `served`."""
    progress(f"trace {network.name}")
    sources = build.folder / "sources"
    sources.mkdir(exist_ok=True)
    source = _trace(stage, network, backend, sources, options, traces)
    progress(f"build {network.name}")
    if options.progress is None:
        options = replace(
            options, progress=lambda phase, step, steps: progress(f"{network.name}: {phase} {step}/{steps}")
        )
    artifact = backend.build(served, source, build.folder, options)
    shutil.rmtree(sources)
    return manifest.NetworkRecord(
        name=network.name,
        artifact=artifact,
        inputs=tuple(
            manifest.NetworkInput(
                name=spec.name,
                dtype=_dtype(spec.dtype),
                min=spec.shape_at("min"),
                opt=spec.shape_at("opt"),
                max=spec.shape_at("max"),
            )
            for spec in (*served.inputs, *served.live_specs)
        ),
        outputs=tuple(
            manifest.NetworkOutput(name=name, dtype=_dtype(tensor.dtype))
            for name, tensor in network.reference(network.samples("opt")).items()
        ),
    )


def _trace(
    stage: Stage, network: Network, backend: Backend, folder: Path, options: BuildOptions, traces: Traces
) -> Path | ExportedProgram:
    if backend.source == "exported_program":
        return traces.program(network)
    source = folder / f"{network.name}.onnx"
    traces.save_onnx(stage, network, options.opset, source)
    return source


@contextmanager
def _random_live(stage: Stage) -> Iterator[None]:
    """Give the live tensors random values in place within the block.

    A new LoRA has no effect (B = 0), so an engine that ignores it would pass the comparison.
    """
    tensors = [(network.live[spec.name], spec) for network in stage.networks for spec in network.live_specs]
    own = [tensor.detach().clone() for tensor, _ in tensors]
    generator = torch.Generator().manual_seed(_LIVE_SEED)
    try:
        with torch.no_grad():
            for tensor, spec in tensors:
                tensor.copy_(spec.random(tuple(tensor.shape), generator))
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), values in zip(tensors, own, strict=True):
                tensor.copy_(values)


def _parity(stage: Stage, runners: Mapping[str, Runner]) -> list[manifest.Parity]:
    """Measure every network on random inputs of two sizes, and the whole stage on each of its cases."""
    measured = []
    for network in stage.networks:
        for size in _PARITY_SIZES:
            inputs = network.samples(size)
            expected, actual = network.reference(inputs), runners[network.name](**inputs)
            measured += compare(network.name, size, expected, actual, stage.tolerance)
    for name, case in stage.cases().items():
        with torch.no_grad():
            expected = stage.torch(*case)
        measured += compare(stage.name, name, expected, stage.run(runners, *case), stage.tolerance)
    return measured


def _discard(store: EngineStore, engine: VerifiedEngine) -> None:
    """Delete an engine, unless another process already has."""
    record = store.get(engine.manifest.id)
    if record is not None:
        store.remove(record)


def _explain(stage: Stage, backend: str, failed: Sequence[manifest.Parity]) -> str:
    worst = max(failed, key=lambda measured: measured.max_abs)
    bound = stage.tolerance
    return (
        f"the {backend} engine of {stage.name} differs from PyTorch: output {worst.output} of {worst.network} "
        f"({worst.case}) by {worst.max_abs:.3g} ({worst.max_rel:.3g} of its largest value, cosine {worst.cosine:.6f}), "
        f"beyond the tolerance of atol {bound.atol:g}, rtol {bound.rtol:g}, cosine {bound.cosine:g}. "
        f"The engine was deleted."
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
