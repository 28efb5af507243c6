"""Measure the memory of the process of `frostline score --ray`, by the number of pairs.

    python benchmarks/ray_memory.py --rows 1000,10000,100000 --formats parquet,csv

All rows score the same small clip of one frame with a reward without networks (`sharpness`), so that only reading pairs
and writing results can use more memory with more rows. Memory is the unshared memory of the process (USS), sampled
while the command runs: its peak, and the median of the last quarter of the samples. For the largest worker, the peak is
measured, too. Ray's object store is shared memory, which is not included; Ray limits its size.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import RESULTS, machine, write_result
from rich.console import Console
from rich.table import Table

from frostline.progress import Progress
from frostline.video import write_video

_SECONDS = 0.5
_OPTIONS = ["--reward", "sharpness", "--ray", "local", "--workers", "2", "--device", "cpu", "--overwrite"]
_MEASURES = ("rows", "seconds", "peak_mb", "late_mb", "worker_peak_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000", help="comma-separated numbers of pairs")
    parser.add_argument(
        "--formats", default="parquet,csv", help="comma-separated formats of pairs; results are Parquet"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "ray_memory.json")
    arguments = parser.parse_args()
    cases = [(name, int(rows)) for name in arguments.formats.split(",") for rows in arguments.rows.split(",")]
    runs = []
    with tempfile.TemporaryDirectory() as folder, Progress().bar("score", len(cases)) as bar:
        write_video(Path(folder) / "clip.mp4", torch.rand(1, 3, 32, 32))
        for name, rows in cases:
            runs.append({"pairs": name, **measure(write_pairs(Path(folder) / f"pairs.{name}", rows), rows)})
            bar.advance(1)
    write_result(arguments.out, {"runs": runs, "machine": machine(torch.device("cpu"))})
    table = Table("pairs", *_MEASURES)
    for run in runs:
        table.add_row(run["pairs"], *(f"{run[name]:.0f}" for name in _MEASURES))
    Console().print(table)


def write_pairs(file: Path, rows: int) -> Path:
    """Write a file with `rows` pairs of the same clip, as Parquet or CSV; return its path."""
    videos = ["clip.mp4"] * rows
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"video": videos}), file)
    else:
        with file.open("w", newline="") as target:
            csv.writer(target).writerows([["video"], *([video] for video in videos)])
    return file


def measure(pairs: Path, rows: int) -> dict[str, Any]:
    """Score the pairs in a separate process; sample its memory and that of its workers, in MB."""
    out = pairs.with_name("scores.parquet")
    command = [sys.executable, "-m", "frostline", "score", "--pairs", str(pairs), "--out", str(out), *_OPTIONS]
    start = time.perf_counter()
    samples, workers = [], [0.0]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            samples.append(megabytes(process.pid))
            workers.append(max(map(megabytes, workers_of(process.pid)), default=0.0))
            time.sleep(_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}:\n{log.read().decode()}")
    found = pq.read_table(out, columns=["video"]).num_rows
    assert found == rows, f"{found} of {rows} rows"
    late = statistics.median(samples[-(len(samples) // 4 + 1) :])
    return dict(zip(_MEASURES, (rows, seconds, max(samples), late, max(workers)), strict=True))


def megabytes(pid: int) -> float:
    """Return the unshared memory of a process in MB; 0 if it has ended."""
    try:
        return psutil.Process(pid).memory_full_info().uss / 1e6
    except psutil.Error:
        return 0.0


def workers_of(pid: int) -> list[int]:
    """Return the ids of the scoring processes among the descendants of `pid`.

    Ray puts the name of the actor into their command line.
    """
    try:
        below = psutil.Process(pid).children(recursive=True)
        return [process.pid for process in below if "MapWorker" in "".join(process.cmdline())]
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
