"""Time two epochs of a run on the tiny model, with and without precomputed frozen outputs.

    python benchmarks/epochs.py --out benchmarks/results/epochs.json

Each run is complete, from the settings to the adapter, in a new folder with an empty cache. The two variants alternate.
Without `precompute`, the steps of the first epoch compute the frozen outputs of each sample; with it, all steps read
them from the cache. The seconds of a run include loading and precomputing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from building import ENGINES
from measuring import RESULTS, machine, ratio, write_result

from frostline.demo.dataset import write_datasets
from frostline.progress import Progress
from frostline.train.launch import run_training
from frostline.train.settings import RunSettings

CONTENDERS: Mapping[str, str] = {"never": "without precompute", "always": "with precompute"}


def main() -> None:
    """Run the variants alternately, write JSON and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="plan.backend of the runs")
    parser.add_argument("--engines-dir", type=Path, default=ENGINES)
    parser.add_argument("--out", type=Path, default=RESULTS / "epochs.json")
    arguments = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_datasets(place / "data", arguments.clips, 1)
        # The first round is a warm-up, for example for imports, and is not counted.
        for index in range(1 + arguments.rounds):
            for name in [*CONTENDERS][:: 1 if index % 2 else -1]:
                settings = settings_of(place / "data" / "train", place / f"{name}-{index}", name, arguments)
                figures = one_run(settings, arguments.clips)
                if index:
                    samples[name].append(figures)
    totals = {name: [run["seconds"] for run in runs] for name, runs in samples.items()}
    result = {
        "what": f"tiny, {arguments.clips} clips, two epochs, batch size 1",
        "contenders": {
            name: {"what": what, **_medians(samples[name]), "samples": samples[name]}
            for name, what in CONTENDERS.items()
        },
        "never_over_always": ratio(totals, "never", "always"),
        "machine": machine(torch.device("cpu")),
    }
    write_result(arguments.out, result)
    for row in result["contenders"].values():
        print(
            f"{row['what']}: steps of the first epoch {row['first_epoch_ms']:.0f} ms, of the second "
            f"{row['second_epoch_ms']:.0f} ms, whole run {row['seconds']:.1f} s"
        )


def settings_of(data: Path, output_dir: Path, precompute: str, arguments: argparse.Namespace) -> RunSettings:
    """Return the settings of a run of two epochs."""
    return RunSettings.parse(
        {
            "model": "tiny",
            "device": "cpu",
            "output_dir": str(output_dir),
            "precompute": precompute,
            "lora": {"rank": 8},
            "plan": {"backend": arguments.backend, "engines": str(arguments.engines_dir)},
            "rewards": [{"type": "face_identity", "upscale": 2}],
            "data": {"source": str(data), "num_frames": 9},
            "train": {"max_train_steps": 2 * arguments.clips, "checkpointing_steps": 2 * arguments.clips},
        }
    )


def one_run(settings: RunSettings, steps_per_epoch: int) -> dict[str, float]:
    """Train; return the median milliseconds of a step in each epoch, and the seconds of the run."""
    start = time.monotonic()
    run_training(settings, None, Progress(quiet=True))
    seconds = time.monotonic() - start
    lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["seconds"] for line in lines]
    return {**by_epoch(steps, steps_per_epoch), "seconds": seconds}


def by_epoch(steps: Sequence[float], steps_per_epoch: int) -> dict[str, float]:
    """Return the median milliseconds of the steps of the first and of the second epoch; `steps` are in seconds."""
    first, second = steps[:steps_per_epoch], steps[steps_per_epoch:]
    return {"first_epoch_ms": 1000 * statistics.median(first), "second_epoch_ms": 1000 * statistics.median(second)}


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
