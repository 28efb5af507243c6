"""Measure startup times: the command line, the first score of a clip, loading engines, and the demo.

    python benchmarks/cold.py --out benchmarks/results/cold.json
    python benchmarks/cold.py --demo     # also clones the repository and runs `make demo` there, which takes minutes

In each round, each command runs in a new process with an empty cache folder. Engines are loaded in this process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import skimage.data
import torch
from building import add_engine_arguments, build_engines
from measuring import RESULTS, interleave, machine, summary, write_result
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes import TINY, build_components, face_stages

from frostline.config import LoraSettings
from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.backends import get_backend
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import find_engine, weights_sha256
from frostline.stages.shapes import ShapeRange
from frostline.stages.staged_model import stage_model
from frostline.stages.wan.family import video_model
from frostline.video import write_video

_REPOSITORY = Path(__file__).parents[1]
_CPU = torch.device("cpu")


def main() -> None:
    """Measure, print a table and write JSON."""
    arguments = _arguments()
    result: dict[str, Any] = {"machine": machine(_CPU), "waits": {}}
    with tempfile.TemporaryDirectory() as folder:
        waits = {**_processes(Path(folder)), **_engine_loads(arguments)}
        # After the warm-up round, all files are in the page cache of the system; before it, loading is slower.
        samples = interleave(waits, arguments.rounds, _CPU)
    result["waits"] = {name: {**row, "samples_ms": samples[name]} for name, row in summary(samples).items()}
    if arguments.demo:
        demo = interleave({"make demo, from a fresh clone": _demo}, 1, _CPU, warm_up=0)
        result["waits"] |= {name: {**row, "samples_ms": demo[name]} for name, row in summary(demo).items()}
    write_result(arguments.out, result)
    table = Table("from a cold start", "s")
    for name, row in result["waits"].items():
        table.add_row(name, f"{row['median_ms'] / 1000:.2f}")
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--demo", action="store_true", help="also run `make demo` in a new clone")
    parser.add_argument("--out", type=Path, default=RESULTS / "cold.json")
    return parser.parse_args()


def _processes(folder: Path) -> dict[str, Callable[[], None]]:
    """Return the commands to run, by description. Each runs in a new process, and is timed until it exits."""
    video = folder / "clip.mp4"
    picture = folder / "face.png"
    write_video(video, held_out_clips(1, seed=0, num_frames=9, size=256).video[0], fps=8)
    Image.fromarray(skimage.data.astronaut()[0:300, 60:360]).save(picture)
    score = ("score", str(video), "--reference", str(picture), "--out", str(folder / "scores.jsonl"))

    def scoring(*more: str) -> Callable[[], None]:
        def run() -> None:
            for left in folder.glob("scores*"):
                left.unlink()
            _frostline(*score, "--engines-dir", str(folder / "no-engines"), *more)

        return run

    def module() -> None:
        code = "from frostline.train import WanTrainingModule; WanTrainingModule.from_pretrained('tiny', engines=None)"
        _run([sys.executable, "-c", code])

    return {
        "frostline --help": lambda: _frostline("--help"),
        "frostline train --print-config": lambda: _frostline("train", "--print-config"),
        "frostline score, one clip of 9 frames, mtcnn": scoring(),
        "frostline score, one clip of 9 frames, yunet": scoring("--detector", "yunet"),
        "WanTrainingModule of tiny, imports included": module,
    }


def _engine_loads(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return functions that verify and load the engines of a backend, in this process, with its libraries imported."""
    shapes = ShapeRange()
    components = build_components(TINY, torch.float32, _CPU)
    staged = stage_model(video_model(components, LoraSettings(rank=8)), face_stages(shapes), shapes)
    store = EngineStore(arguments.engines_dir)
    stages = [stage for name, stage in staged.stages.items() if name != "vae_decoder"]
    build_engines(stages, arguments.backends, store)
    weights = {stage.name: weights_sha256(stage) for stage in stages}

    def loading(backend: str) -> Callable[[], None]:
        def run() -> None:
            for stage in stages:
                record = find_engine(store, stage, backend, weights[stage.name])
                assert record is not None
                networks = {network.name: network for network in stage.networks}
                get_backend(backend).load(store.verify(record), networks, _CPU)

        return run

    return {f"{len(stages)} engines of tiny, {backend}": loading(backend) for backend in arguments.backends}


def _demo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "frostline"
        _run(["git", "clone", "--quiet", str(_REPOSITORY), str(clone)])
        _run(["make", "-C", str(clone), "demo"])


def _frostline(*arguments: str) -> None:
    _run([sys.executable, "-m", "frostline", *arguments])


def _run(command: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FROSTLINE_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


if __name__ == "__main__":
    main()
