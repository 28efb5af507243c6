"""Compare the backends of each stage with eager PyTorch and torch.compile: speed, build and load time, memory, parity.

    python benchmarks/stages.py --model tiny --backends onnxruntime,aotinductor,openvino
    python benchmarks/stages.py --model wan2.1-1.3b --device cuda --precision bf16 --video 1x17x3x256x256 --shapes ""

Engines are built once, for `--video`, and also run at each shape of `--shapes`. In eager PyTorch, Conv3d uses oneDNN at
every batch size; `torch, own Conv3d` is the VAE with the implementation that torch selects. `bound` is a lower bound on
the time on this device, from `roofline.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from building import add_engine_arguments, add_shape_arguments, engine_shapes
from contenders import plain_copy
from measuring import (
    RESULTS,
    interleave,
    machine,
    peak_growth_mib,
    ratio,
    summary,
    synchronize,
    write_result,
)
from rich.console import Console
from rich.table import Table
from roofline import Ceilings, measure_ceilings, measure_work
from shapes import DTYPES, TINY, WAN_1_3B, build_components, clips_of, face_stages
from torch import Tensor

from frostline.config import LoraSettings
from frostline.errors import FrostlineError
from frostline.export.exporter import export_stage
from frostline.export.tracing.trace_cache import Traces
from frostline.models.faces.detections import quantize_frames
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.device import full_fp32
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.stage import Stage
from frostline.stages.staged_model import StagedModel, stage_model
from frostline.stages.wan.family import video_model

_COMPILE = "torch.compile"
_OWN_CONV3D = "torch, own Conv3d"
_ENGINE_COLUMNS = ("build_seconds", "load_seconds", "engine_mb")

Run = Callable[[dict[str, Tensor]], Any]


def main() -> None:
    """Measure, print a table and write JSON."""
    start = time.monotonic()
    arguments = _arguments()
    device = torch.device(arguments.device)
    staged, plain_vae = _stage(arguments, arguments.video, device)
    names = arguments.stages.split(",") if arguments.stages else list(staged.stages)
    inputs = {name: {arguments.video: _inputs(staged.stages[name], arguments.video, device)} for name in names}
    for video in filter(None, arguments.shapes.split(",")):
        other, _ = _stage(arguments, video, device)
        for name in names:
            inputs[name][video] = _inputs(other.stages[name], video, device)
    with full_fp32():
        ceilings = {dtype: measure_ceilings(device, dtype) for dtype in {torch.float32, DTYPES[arguments.precision]}}
    result: dict[str, Any] = {
        "machine": machine(device),
        "ceilings": {str(dtype).removeprefix("torch."): vars(each) for dtype, each in ceilings.items()},
        "model": arguments.model,
        "stages": {},
    }
    store = EngineStore(arguments.engines_dir)
    for name in names:
        # The face networks use fp32 convolutions. Without this, a GPU would compute them in TF32, unlike the engines.
        with torch.no_grad(), full_fp32():
            stage = staged.stages[name]
            measured = _measure(stage, plain_vae, inputs[name], store, arguments, device)
            for video, tensors in inputs[name].items():
                measured["shapes"][video]["roofline"] = _roofline(stage, tensors, ceilings)
            result["stages"][name] = measured
        result["seconds"] = time.monotonic() - start
        write_result(arguments.out, result)
        Console(width=160).print(_table({name: result["stages"][name]}))
    Console().print(f"{result['seconds']:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(TINY, WAN_1_3B), default=TINY)
    parser.add_argument("--stages", help="comma-separated; all if not given")
    add_engine_arguments(parser)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    add_shape_arguments(parser, "2x9x3x96x96")
    parser.add_argument("--shapes", default="1x5x3x64x64,1x17x3x128x128", help="further shapes, comma-separated")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS / "stages.json")
    return parser.parse_args()


def _stage(arguments: argparse.Namespace, video: str, device: torch.device) -> tuple[StagedModel, Any]:
    """Return the stages for a shape, and a VAE without oneDNN convolutions."""
    components = build_components(arguments.model, DTYPES[arguments.precision], device)
    plain_vae = plain_copy(components)
    shapes = engine_shapes(video, arguments.fixed_shapes, _faces(video))
    of_rewards = face_stages(shapes, device)
    return stage_model(video_model(components, LoraSettings(rank=arguments.rank)), of_rewards, shapes), plain_vae


def _inputs(stage: Stage, video: str, device: torch.device) -> dict[str, Tensor]:
    """Return example inputs of the stage for a video of this shape, by name."""
    if stage.name == "face_detector":
        return {"frames": quantize_frames(clips_of(video)["video"].flatten(0, 1)).to(device)}
    return dict(next(iter(stage.cases().values())).inputs)


def _faces(video: str) -> int:
    """Return the number of faces, with one face per frame."""
    batch, frames, *_ = (int(part) for part in video.split("x"))
    return batch * frames


def _measure(
    stage: Stage,
    plain_vae: Any,
    inputs: dict[str, dict[str, Tensor]],
    store: EngineStore,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Measure all contenders of one stage at all shapes."""
    runs: dict[str, Run] = {TORCH: stage.torch}
    built: dict[str, dict[str, Any]] = {TORCH: {}}
    if device.type == "cpu" and (own := _own_conv3d(stage, plain_vae)):
        runs[_OWN_CONV3D] = own
    traces = Traces()
    for backend in arguments.backends:
        try:
            built[backend], runs[backend] = _engine(stage, backend, store, traces, device)
        except FrostlineError as error:
            built[backend] = {"error": _first_line(error)}
    if not arguments.no_compile:
        runs[_COMPILE] = _compiled(stage)
    shapes = {}
    for video, tensors in inputs.items():
        rows: dict[str, dict[str, Any]] = {}
        for name, run in [*runs.items()]:
            try:
                first = time.perf_counter()
                outputs = run(tensors)
                synchronize(device)
                rows[name] = {"first_call_seconds": time.perf_counter() - first}
            except Exception as error:  # the compiler raises many types; an engine may not support the shape
                rows[name] = {"error": _first_line(error)}
                continue
            rows[name]["relative_error"] = _relative_error(stage.torch(tensors), outputs)
        calls = {name: partial(runs[name], tensors) for name, row in rows.items() if "error" not in row}
        samples = interleave(calls, arguments.rounds, device)
        for name, row in summary(samples).items():
            rows[name] |= {**row, "samples_ms": samples[name], "torch_over_this": ratio(samples, TORCH, name)}
            # torch does not count the memory that engines allocate themselves on a GPU.
            by_itself = name in arguments.backends and get_backend(name).holds_weights
            unseen = device.type == "cuda" and by_itself
            rows[name]["memory_mib"] = None if unseen else peak_growth_mib(calls[name], device)
        shapes[video] = {"inputs": {name: list(tensor.shape) for name, tensor in tensors.items()}, "contenders": rows}
    return {"engines": built, "shapes": shapes}


def _engine(
    stage: Stage, backend: str, store: EngineStore, traces: Traces, device: torch.device
) -> tuple[dict[str, Any], Run]:
    exported = export_stage(stage, backend, store, traces=traces)
    if exported.unverified:
        raise FrostlineError(f"built in {exported.manifest.build_seconds:.0f} s, not run: {exported.unverified}")
    record = store.get(exported.manifest.id)
    assert record is not None
    start = time.perf_counter()
    networks = {network.name: network for network in stage.networks}
    run = partial(stage.run, get_backend(backend).load(store.verify(record), networks, device))
    synchronize(device)
    load_seconds = time.perf_counter() - start
    row = {
        "build_seconds": exported.manifest.build_seconds,
        "load_seconds": load_seconds,
        "engine_mb": record.bytes / 1e6,
        "parity": exported.worst.model_dump(mode="json"),
    }
    return row, run


def _roofline(stage: Stage, tensors: dict[str, Tensor], ceilings: Mapping[torch.dtype, Ceilings]) -> dict[str, float]:
    modules = [network.module for network in stage.networks]
    weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
    work = measure_work(lambda: stage.torch(tensors).values(), tensors.values(), weights)
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    return {**vars(work), "bound_ms": work.milliseconds(ceilings[dtype])}


def _compiled(stage: Stage) -> Run:
    """Return a function that runs the stage with all of its networks compiled by `torch.compile`."""
    runners = {}
    for network in stage.networks:
        module = torch.compile(network.module)

        def run(module: Any = module, network: Any = network, **tensors: Tensor) -> dict[str, Tensor]:
            result = module(*(tensors[spec.name] for spec in network.inputs), *network.live.values())
            return dict(zip(network.outputs, result if isinstance(result, tuple) else (result,), strict=True))

        runners[network.name] = run
    return partial(stage.run, runners)


def _own_conv3d(stage: Stage, vae: Any) -> Run | None:
    """Return a function that runs the stage with diffsynth's VAE and torch's Conv3d; None for stages without Conv3d."""
    if stage.name == "vae_encoder":
        return lambda tensors: {"latents": vae.model.encode(tensors["video"], vae.scale)}
    if stage.name == "vae_decoder":
        return lambda tensors: {"video": vae.model.decode(tensors["latents"], vae.scale).clamp(-1, 1)}
    return None


def _relative_error(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float | None:
    """Return the largest relative error of the outputs; None if shapes differ, for example by the number of faces."""
    errors = []
    for name, tensor in expected.items():
        if tensor.shape != actual[name].shape:
            return None
        wanted, got = tensor.double(), actual[name].double()
        errors.append(((got - wanted).norm() / wanted.norm().clamp(min=1e-12)).item() if tensor.numel() else 0.0)
    return max(errors)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:500]


def _table(stages: dict[str, Any]) -> Table:
    table = Table("stage", "shape", "contender", title="torch / this: above 1 is faster than eager PyTorch")
    for column in (
        "median ms",
        "bound ms",
        "torch / this",
        "relative error",
        "memory MiB",
        "first call s",
        "build s",
        "load s",
        "MB",
    ):
        table.add_column(column, justify="right")
    for stage, measured in stages.items():
        failed = {name: row for name, row in measured["engines"].items() if "error" in row}
        for name, row in failed.items():
            table.add_row(stage, "", name, "-", row["error"][:60])
        for shape, at_shape in measured["shapes"].items():
            for name, row in at_shape["contenders"].items():
                if "error" in row:
                    table.add_row(stage, shape, name, "-", row["error"][:60])
                    continue
                engine = measured["engines"].get(name, {})
                table.add_row(
                    stage,
                    shape,
                    name,
                    f"{row['median_ms']:.2f}",
                    f"{at_shape['roofline']['bound_ms']:.2f}",
                    f"{row['torch_over_this']['median']:.2f}",
                    "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}",
                    "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
                    f"{row['first_call_seconds']:.2f}",
                    *(f"{engine[key]:.2f}" if key in engine else "-" for key in _ENGINE_COLUMNS),
                )
    return table


if __name__ == "__main__":
    main()
