"""Each stage on each backend against eager PyTorch and torch.compile: speed, build and load time, memory, parity.

python benchmarks/stages.py --model tiny --backends onnxruntime,aotinductor,openvino
python benchmarks/stages.py --model wan2.1-1.3b --device cuda --precision bf16 --video 1x17x3x256x256
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, interleave, machine, peak_gpu_gib, ratio, summary, synchronize, write_result
from rich.console import Console
from rich.table import Table
from shapes import DTYPES, TINY, WAN_1_3B, build_components
from torch import Tensor

from frostline.config import LoraSettings, RewardSettings
from frostline.errors import FrostlineError
from frostline.export.exporter import export_stage
from frostline.export.model import StagedModel, stage_model
from frostline.export.shapes import parse_shapes
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.stage import Stage
from frostline.runtime.store import EngineStore

_COMPILE = "torch.compile"


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    staged = stage_model(
        build_components(arguments.model, DTYPES[arguments.precision], device),
        LoraSettings(rank=arguments.rank),
        RewardSettings(),
        parse_shapes("", f"video:{arguments.video}", ""),
    )
    names = arguments.stages.split(",") if arguments.stages else list(staged.stages)
    result: dict[str, Any] = {"arguments": vars(arguments) | {"out": str(arguments.out)}, "machine": machine(device)}
    result["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = EngineStore(arguments.engines_dir or Path(folder))
        for name in names:
            result["stages"][name] = _measure(staged, staged.stages[name], store, arguments, device)
            write_result(arguments.out, result)
            Console().print(_table({name: result["stages"][name]}))
    Console().print(_table(result["stages"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(TINY, WAN_1_3B), default=TINY)
    parser.add_argument("--stages", help="comma-separated; all if not given")
    parser.add_argument("--backends", default="onnxruntime")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--video", default="2x9x3x96x96", help="BxTx3xHxW")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--engines-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "stages.json")
    return parser.parse_args()


def _measure(
    staged: StagedModel, stage: Stage, store: EngineStore, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    inputs = stage.sample()
    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Callable[[], Any]] = {TORCH: lambda: stage.torch(**inputs)}
    expected = _run(contenders[TORCH])
    if not arguments.no_compile:
        try:
            contenders[_COMPILE] = _compiled(stage, inputs)
            rows[_COMPILE] = {"build_seconds": _seconds(contenders[_COMPILE], device)}
        except Exception as error:  # the compiler's own many types
            rows[_COMPILE] = {"error": _first_line(error)}
            contenders.pop(_COMPILE, None)
    for backend in arguments.backends.split(","):
        try:
            rows[backend], contenders[backend] = _engine(stage, backend, store, inputs, device)
        except FrostlineError as error:
            rows[backend] = {"error": _first_line(error)}
    samples = interleave({name: _no_grad(run) for name, run in contenders.items()}, arguments.rounds, device)
    for name, run in contenders.items():
        row = rows.setdefault(name, {})
        row |= summary(samples)[name]
        row |= {"samples_ms": samples[name], "peak_gpu_gib": peak_gpu_gib(_no_grad(run), device)}
        row["relative_error"] = _relative_error(expected, _run(run))
        row["torch_over_this"] = ratio(samples, TORCH, name)
    return {"inputs": {name: list(tensor.shape) for name, tensor in inputs.items()}, "contenders": rows}


def _engine(
    stage: Stage, backend: str, store: EngineStore, inputs: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Any], Callable[[], Any]]:
    exported = export_stage(stage, backend, store)
    if exported.unverified:
        raise FrostlineError(f"built in {exported.manifest.build_seconds:.0f} s, not run: {exported.unverified}")
    record = store.get(*vars(exported.manifest.id).values())
    assert record is not None
    start = time.perf_counter()
    networks = {network.name: network for network in stage.networks}
    run = stage.assemble(get_backend(backend).load(store.verify(record), networks, device))
    run(**inputs)
    synchronize(device)
    worst = max(exported.manifest.parity, key=lambda parity: parity.max_rel)
    row = {
        "build_seconds": exported.manifest.build_seconds,
        "load_seconds": time.perf_counter() - start,
        "engine_mb": record.bytes / 1e6,
        "parity": worst.model_dump(),
    }
    return row, lambda: run(**inputs)


def _compiled(stage: Stage, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Every network of the stage in `torch.compile`, put together as an engine's would be."""
    runners = {}
    for network in stage.networks:
        module = torch.compile(network.module)

        def run(module: Any = module, network: Any = network, **tensors: Tensor) -> dict[str, Tensor]:
            result = module(*(tensors[spec.name] for spec in network.inputs), *network.live.values())
            return dict(zip(network.outputs, result if isinstance(result, tuple) else (result,), strict=True))

        runners[network.name] = run
    assembled = stage.assemble(runners)
    return lambda: assembled(**inputs)


@torch.no_grad()
def _run(contender: Callable[[], Any]) -> Any:
    return contender()


def _no_grad(contender: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(contender)


def _seconds(contender: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    _run(contender)
    synchronize(device)
    return time.perf_counter() - start


def _relative_error(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float | None:
    """The largest over all outputs; None where even their shapes differ, as another number of faces would make them."""
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
    table = Table("stage", "contender", title="torch / this: above 1 is faster than eager PyTorch")
    for column in ("median ms", "torch / this", "relative error", "build s", "load s", "peak GPU GiB"):
        table.add_column(column, justify="right")
    for stage, measured in stages.items():
        for name, row in measured["contenders"].items():
            if "error" in row:
                table.add_row(stage, name, "-", row["error"][:60])
                continue
            peak, build, load = row["peak_gpu_gib"], row.get("build_seconds"), row.get("load_seconds")
            table.add_row(
                stage,
                name,
                f"{row['median_ms']:.2f}",
                f"{row['torch_over_this']['median']:.2f}",
                "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}",
                "-" if build is None else f"{build:.1f}",
                "-" if load is None else f"{load:.2f}",
                "-" if peak is None else f"{peak:.2f}",
            )
    return table


if __name__ == "__main__":
    main()
