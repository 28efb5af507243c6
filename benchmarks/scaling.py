"""Measure how the time and the memory of a step depend on frames, pixels, batch size, LoRA rank and tail steps.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json    # also writes scaling.png

One parameter is varied at a time; the others are `--video`, rank 8 and 4 tail steps. `cached` is frostline with frozen
outputs read from the cache, on engines that are built once for a range of shapes. `eager` is the same step in PyTorch
only, without a cache. Every frame is treated as having a face, whatever the detector finds. Memory is the peak growth
of the process during a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from building import add_engine_arguments, build_engines
from measuring import RESULTS, interleave, machine, peak_growth_mib, summary, write_result
from rich.console import Console
from rich.table import Table
from shapes import TINY, build_components, reward_faces_everywhere

from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.runtime.backends import TORCH
from frostline.runtime.engines.store import EngineStore
from frostline.stages.shapes import parse_shapes
from frostline.train import WanTrainingModule
from frostline.train.step_settings import TrainingModuleSettings

CONTENDERS = ("cached", "eager")
_INFERENCE_STEPS = 8


@dataclass(frozen=True)
class Point:
    """The values of all varied parameters."""

    batch: int
    frames: int
    pixels: int
    rank: int = 8
    tail: int = 4


# The varied parameters: name on the axis, and values.
AXES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "frames": ("frames per clip", (5, 9, 17)),
    "pixels": ("height and width in pixels", (64, 96, 128)),
    "batch": ("batch size", (1, 2, 4)),
    "rank": ("LoRA rank", (4, 32, 128)),
    "tail": ("steps of the tail", (1, 4, 8)),
}


def main() -> None:
    """Measure, print tables, and write JSON and the plot."""
    start = time.monotonic()
    arguments = _arguments()
    device = torch.device(arguments.device)
    batch, frames, _, pixels, _ = (int(part) for part in arguments.video.split("x"))
    base = Point(batch, frames, pixels)
    shapes = parse_shapes("", f"video:{arguments.engine_video}", "")
    store = EngineStore(arguments.engines_dir)
    stages = [stage for stage in _module(base, shapes, arguments).stages.values() if stage.name != "vae_decoder"]
    build_engines(stages, arguments.backends, store)  # in training, the decoder needs gradients and runs in PyTorch
    result: dict[str, Any] = {"base": vars(base), "machine": machine(device), "axes": {}}
    measured: dict[Point, dict[str, Any]] = {}  # most axes contain the base point
    for axis, values in wanted_axes(arguments.axes).items():
        rows = []
        with Progress().bar(axis, len(values)) as bar:
            for value in values:
                point = replace(base, **{axis: value})
                if point not in measured:
                    measured[point] = _measure(point, shapes, arguments, device)
                rows.append({axis: value, **measured[point]})
                bar.advance(1)
        result["axes"][axis] = rows
        write_result(arguments.out, result)
    result["seconds"] = time.monotonic() - start
    write_result(arguments.out, result)
    plot(result, arguments.out.with_suffix(".png"))
    for axis, rows in result["axes"].items():
        Console().print(_table(axis, rows))
    Console().print(f"{result['seconds']:.0f} s")


def wanted_axes(names: str) -> dict[str, tuple[int, ...]]:
    """Return the values to measure, by axis; all axes if `names` is empty."""
    chosen = names.split(",") if names else list(AXES)
    return {name: AXES[name][1] for name in chosen}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--video", default="1x9x3x64x64", help="shape BxTx3xHxW of the base point")
    parser.add_argument("--engine-video", default="2x9x3x96x96", help="shape that engines are optimized for")
    parser.add_argument("--axes", default="", help=f"comma-separated, of {', '.join(AXES)}; all if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    return parser.parse_args()


def _module(point: Point, shapes: Any, arguments: argparse.Namespace) -> WanTrainingModule:
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": point.rank},
            "num_inference_steps": _INFERENCE_STEPS,
            "grad_start_step": _INFERENCE_STEPS - point.tail,
            "grad_end_step": _INFERENCE_STEPS - 1,
            "gradient_checkpointing": "none",
            "rewards": [{"type": "face_identity", "upscale": 2}],
        }
    )
    components = build_components(TINY, torch.float32, torch.device(arguments.device))
    module = WanTrainingModule(components, settings, engines=arguments.engines_dir, shapes=shapes)
    # Without faces, a step ends early and has no gradient, so that it would be too fast.
    reward_faces_everywhere(module)
    return module


def _measure(point: Point, shapes: Any, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    module = _module(point, shapes, arguments)
    clips = held_out_clips(point.batch, seed=0, num_frames=point.frames, size=point.pixels)
    data = {"prompt": clips.prompts, "video": clips.video}
    steps = {name: _step(module, data, name) for name in CONTENDERS}
    samples = interleave(steps, arguments.rounds, device)
    rows = summary(samples)
    return {
        name: {**rows[name], "samples_ms": samples[name], "memory_mib": peak_growth_mib(steps[name], device)}
        for name in CONTENDERS
    }


def _step(module: WanTrainingModule, data: Mapping[str, Any], contender: str) -> Callable[[], None]:
    cache = module.conditioner.cache

    def step() -> None:
        eager = contender == "eager"
        module.conditioner.cache = None if eager else cache
        with module.runtime.use(**dict.fromkeys(module.stages, TORCH) if eager else {}):
            loss, _, _ = module(data)
            loss.backward()
        module.zero_grad()

    return step


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write a plot with one column per axis: time above, memory below."""
    from matplotlib.figure import Figure

    axes = result["axes"]
    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, rows) in enumerate(axes.items()):
        values = [row[axis] for row in rows]
        for row, (figure_of, unit) in enumerate((("median_ms", "ms"), ("memory_mib", "MiB"))):
            place = grid[row][column]
            for name in CONTENDERS:
                place.plot(values, [point[name][figure_of] for point in rows], marker="o", label=name)
            place.set_ylim(bottom=0)
            place.set_xlim(left=0)
            place.grid(alpha=0.3)
            place.set_xlabel(AXES[axis][0])
            if column == 0:
                place.set_ylabel(f"{'time per step' if row == 0 else 'peak memory growth'}, {unit}")
    grid[0][0].legend()
    base = result["base"]
    figure.suptitle(
        f"tiny: one parameter varied; the others: batch size {base['batch']}, {base['frames']} frames, "
        f"{base['pixels']} pixels, rank {base['rank']}, {base['tail']} tail steps"
    )
    figure.savefig(path, dpi=100)


def _table(axis: str, rows: list[Mapping[str, Any]]) -> Table:
    table = Table(AXES[axis][0])
    for name in CONTENDERS:
        for unit in ("ms", "MiB"):
            table.add_column(f"{name} {unit}", justify="right")
    for row in rows:
        table.add_row(str(row[axis]), *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    for name in CONTENDERS:
        yield f"{row[name]['median_ms']:.0f}"
        yield f"{row[name]['memory_mib']:.0f}"


if __name__ == "__main__":
    main()
