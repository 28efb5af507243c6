"""The order of an export: skip what is built, trace, build, sign, load, verify, measure."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.errors import ParityError
from frostline.export.onnx import OPSET, trace_onnx
from frostline.export.parity import compare
from frostline.runtime import manifest
from frostline.runtime.backends import TORCH, Backend, get_backend
from frostline.runtime.identity import device_name, precision_of, stage_key, weights_sha256
from frostline.runtime.manifest import Manifest
from frostline.runtime.stage import Network, Runner, Size, Stage, Tolerance
from frostline.runtime.store import Build, EngineStore, VerifiedEngine

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

_LATENCY_SECONDS = 1.5
_LATENCY_RUNS = 15
_PARITY_SIZES: tuple[Size, ...] = ("opt", "min")


@dataclass(frozen=True)
class Exported:
    """One stage on one backend: its manifest, and whether this call built it."""

    manifest: Manifest
    built: bool

    @property
    def worst(self) -> manifest.Parity:
        """The measurement with the largest absolute error."""
        return max(self.manifest.parity, key=lambda parity: parity.max_abs)


def export_stage(
    stage: Stage,
    backend_name: str,
    store: EngineStore,
    *,
    force: bool = False,
    progress: Progress = lambda step: None,
) -> Exported:
    """Make sure that a verified engine of `stage` is in the store.

    Args:
        force: build it even if it is there.
        progress: told what is going on, in a few words.
    Raises:
        EngineError: the backend is not available, or tracing, building or loading failed.
        ParityError: the engine does not compute what PyTorch computes; it is not kept.
    """
    backend = get_backend(backend_name)
    precision, weights = precision_of(stage), weights_sha256(stage)
    key = stage_key(stage, backend_name, precision, weights)
    with store.building(stage.model, stage.name, backend_name, key) as build:
        if build.existing is not None and not force:
            return Exported(build.existing.manifest, built=False)
        start = time.monotonic()
        networks = [_build_network(network, backend, build, progress) for network in stage.networks]
        engine = build.commit(
            Manifest(
                stage=stage.name,
                model=stage.model,
                backend=backend_name,
                precision=precision,
                key=key,
                weights_sha256=weights,
                opset=OPSET,
                networks=tuple(networks),
                versions={"torch": torch.__version__, backend_name: backend.version()},
                device=device_name(stage.networks[0].device),
                build_seconds=time.monotonic() - start,
                tolerance=manifest.Tolerance(**vars(stage.tolerance)),
            )
        )
    progress("verify")
    return Exported(_verify_and_measure(stage, backend_name, store, engine), built=True)


def _build_network(network: Network, backend: Backend, build: Build, progress: Progress) -> manifest.Network:
    progress(f"trace {network.name}")
    sources = build.folder / "sources"
    sources.mkdir(exist_ok=True)
    source = sources / f"{network.name}.onnx"
    trace_onnx(network, source)
    progress(f"build {network.name}")
    artifact = backend.build(network, source, build.folder)
    for path in sources.iterdir():
        path.unlink()
    sources.rmdir()
    specs = (*network.inputs, *network.live_specs)
    return manifest.Network(
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
            for spec in specs
        ),
        outputs=tuple(
            manifest.NetworkOutput(name=name, dtype=_dtype(tensor.dtype))
            for name, tensor in network.reference(network.samples("opt")).items()
        ),
    )


def _verify_and_measure(stage: Stage, backend_name: str, store: EngineStore, engine: VerifiedEngine) -> Manifest:
    networks = {network.name: network for network in stage.networks}
    runners = get_backend(backend_name).load(engine, networks, stage.networks[0].device)
    assembled = stage.assemble(runners)
    parity = _parity(stage, runners, assembled)
    if failed := [measured for measured in parity if not measured.passed]:
        record = store.get(*vars(engine.manifest.id).values())
        if record is not None:
            store.remove(record)
        raise ParityError(_explain(stage, backend_name, failed))
    updated = engine.manifest.updated(
        parity=tuple(parity),
        latency_ms=_latency_ms({TORCH: stage.torch, backend_name: assembled}, stage.sample()),
        verified=True,
    )
    return store.update(engine, updated).manifest


def _parity(stage: Stage, runners: Mapping[str, Runner], assembled: Runner) -> list[manifest.Parity]:
    """Every network on random inputs of two sizes, and the whole stage on realistic ones."""
    measured = []
    for network in stage.networks:
        for size in _PARITY_SIZES:
            inputs = network.samples(size)
            expected, actual = network.reference(inputs), runners[network.name](**inputs)
            measured += compare(network.name, size, expected, actual, stage.tolerance)
    inputs = stage.sample()
    with torch.no_grad():
        expected = stage.torch(**inputs)
    return measured + compare(stage.name, "sample", expected, assembled(**inputs), stage.tolerance)


@torch.no_grad()
def _latency_ms(contenders: Mapping[str, Runner], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Median milliseconds, the contenders taking turns so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(**inputs)
    deadline = time.monotonic() + _LATENCY_SECONDS
    for _ in range(_LATENCY_RUNS):
        for name, run in contenders.items():
            times[name].append(_time_ms(run, inputs))
        if time.monotonic() > deadline:
            break
    return {name: statistics.median(samples) for name, samples in times.items()}


def _time_ms(run: Runner, inputs: Mapping[str, Tensor]) -> float:
    start = time.perf_counter()
    run(**inputs)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _explain(stage: Stage, backend: str, failed: Sequence[manifest.Parity]) -> str:
    worst = max(failed, key=lambda measured: measured.max_abs)
    bound: Tolerance = stage.tolerance
    return (
        f"the {backend} engine of {stage.name} differs from PyTorch: output {worst.output} of {worst.network} "
        f"({worst.case}) by {worst.max_abs:.3g} ({worst.max_rel:.3g} of its largest value, cosine {worst.cosine:.6f}), "
        f"and atol {bound.atol:g}, rtol {bound.rtol:g}, cosine {bound.cosine:g} are allowed. The engine was deleted."
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
