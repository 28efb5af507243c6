"""Compare the speed of `frostline score --ray` and `accelerate launch` with the same number of processes.

    python benchmarks/ray_scoring.py --clips 60 --rounds 2 --out benchmarks/results/ray_scoring.json

In the workload `even`, all clips have the same length; `uneven` has one additional clip that is 50 times as long. The
two commands run alternately. The time of a run with two clips is subtracted from that of all clips, to exclude the
start of Python, Ray and the networks. In each round, the scores of both commands are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from faces import clip
from measuring import RESULTS, machine, write_result

from frostline.progress import Progress
from frostline.video import write_video

_LONG = 50
_FEW = 2
_OPTIONS = ["--detector", "yunet", "--backend", "torch", "--device", "cpu", "--overwrite"]
# The target: the minimum speed of Ray relative to accelerate.
_GOALS = {"even": 0.85, "uneven": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--frames", type=int, default=16, help="number of frames of each clip")
    parser.add_argument("--size", type=int, default=160, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "ray_scoring.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        works = make_works(Path(folder), arguments)
        ways = {"accelerate": with_accelerate, "ray": with_ray}
        seconds: dict[str, dict[str, list[float]]] = {work: {way: [] for way in ways} for work in works}
        with Progress().bar("score", arguments.rounds) as bar:
            for round_ in range(arguments.rounds):
                order = [*ways] if round_ % 2 else [*reversed(ways)]
                for work, pairs in works.items():
                    for way in order:
                        took = timed(ways[way](pairs, arguments.processes))
                        seconds[work][way].append(took)
                    compare(pairs)
                bar.advance(1)
    result = result_of(seconds, arguments)
    write_result(arguments.out, result)
    print(json.dumps(result["works"], indent=2))


def make_works(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Write the clips, and return the file of pairs of each workload; the long clip is in the middle."""
    write_video(folder / "short.mp4", clip(arguments.frames, arguments.size))
    write_video(folder / "long.mp4", clip(_LONG * arguments.frames, arguments.size))
    write_video(folder / "face.mp4", clip(2, arguments.size))
    even = ["short.mp4"] * arguments.clips
    uneven = [*even[: arguments.clips // 2], "long.mp4", *even[arguments.clips // 2 :]]
    works = {}
    for name, videos in {"few": even[:_FEW], "even": even, "uneven": uneven}.items():
        works[name] = folder / f"{name}.csv"
        works[name].write_text("video,reference\n" + "".join(f"{video},face.mp4\n" for video in videos))
    return works


def with_accelerate(pairs: Path, processes: int) -> list[str]:
    """Return the command that divides the pairs over the processes at the start."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    return [*launch, "-m", "frostline", "score", "--pairs", str(pairs), "--out", out_of(pairs, "accelerate"), *_OPTIONS]


def with_ray(pairs: Path, processes: int) -> list[str]:
    """Return the command that assigns pairs to workers while it runs."""
    cluster = ["--ray", "local", "--workers", str(processes)]
    return ["-m", "frostline", "score", "--pairs", str(pairs), "--out", out_of(pairs, "ray"), *cluster, *_OPTIONS]


def out_of(pairs: Path, way: str) -> str:
    """Return the path of the results file of a workload and command."""
    return str(pairs.with_name(f"{pairs.stem}-{way}.jsonl"))


def timed(command: list[str]) -> float:
    """Run a Python command with one thread; return its duration in seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def compare(pairs: Path) -> None:
    """Check that both commands computed the same scores.

    Raises:
        AssertionError: scores differ by more than 1e-5.
    """
    found = []
    for way in ("accelerate", "ray"):
        lines = Path(out_of(pairs, way)).read_text().splitlines()
        found.append(torch.tensor([json.loads(line)["face_score"] for line in lines]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def result_of(seconds: Mapping[str, Mapping[str, list[float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results; each ratio is the median over the rounds of a ratio of two times of the same round."""
    works: dict[str, Any] = {}
    for work, least in _GOALS.items():
        net = {
            way: [all_ - few for all_, few in zip(took, seconds["few"][way], strict=True)]
            for way, took in seconds[work].items()
        }
        ratio = statistics.median(a / r for a, r in zip(net["accelerate"], net["ray"], strict=True))
        works[work] = {
            "seconds": {way: statistics.median(each) for way, each in net.items()},
            "with_start": {way: statistics.median(each) for way, each in seconds[work].items()},
            "ray_to_accelerate": ratio,
            "asked": least,
            "met": ratio >= least,
        }
    size = f"{arguments.clips} clips of {arguments.frames} frames, {arguments.size} px, {arguments.processes} processes"
    return {"what": size, "rounds": arguments.rounds, "works": works, "machine": machine(torch.device("cpu"))}


if __name__ == "__main__":
    main()
