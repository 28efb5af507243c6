"""Measure the effect of step settings on score, judge and KL in training runs on the tiny model, over several seeds.

    frostline export tiny
    python benchmarks/trials.py --seeds 0,1,2 --data runs/demo/data
    python benchmarks/trials.py --trials default,base --seeds 0 --steps 20

Each run uses the data, settings and judge of the demo, with the changes of one trial, and with the steps, learning rate
and KL weight of the options. Validation samples are scored before and after training, and compared frame by frame.
Changes are averaged over the samples, then over the seeds (plus or minus their standard deviation). Seconds per step
are the median over the steps; they are only meaningful on an idle machine. CPU seconds are those of the whole run with
its validation, which is the same for all runs. Runs that are already in the output file are skipped, so that an
interrupted benchmark can be resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, machine, write_result
from rich.console import Console
from rich.table import Table
from table import mean_and_deviation

from frostline.demo.dataset import write_datasets
from frostline.demo.run import DemoSettings, demo_settings, scores_of
from frostline.progress import Progress
from frostline.train.launch import run_training
from frostline.train.loop.run_dir import METRICS, VALIDATION, read_lines
from frostline.train.settings import RunSettings

TRIALS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "last": {"backprop": {"strategy": "last"}},
    "random:2": {"backprop": {"strategy": "random", "num_steps": 2}},
    "uniform:2": {"backprop": {"strategy": "uniform", "num_steps": 2}},
    "stop_latent_gradient": {"backprop": {"stop_latent_gradient": True}},
    "lv_samples:2": {"backprop": {"strategy": "last", "lv_samples": 2}},
    "window:1": {"decode": {"num_latent_frames": 1}},
    "kl_steps:1": {"backprop": {"kl_steps": "random:1"}},
    # Latents are only reused if the noise of a sample is fixed.
    "fixed noise": {"noise_seed": 24},
    "base": {"noise_seed": 24, "rollout": {"policy": "base"}},
    "stale:20": {"noise_seed": 24, "rollout": {"policy": "stale:20"}},
}


def main() -> None:
    """Train, write JSON after each run, and print a table."""
    arguments = _arguments()
    runs: dict[str, Any] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    shared = {name: getattr(arguments, name) for name in ("steps", "starts", "learning_rate", "kl_weight")}
    if not (arguments.data / "train").exists():
        write_datasets(arguments.data, arguments.clips, arguments.starts)
    for seed in seeds:
        for name in arguments.trials.split(","):
            key = ", ".join([name, f"seed {seed}", *(f"{key} {value:g}" for key, value in shared.items())])
            if key not in runs:
                runs[key] = {"trial": name, "seed": seed, **shared, **_run(name, seed, arguments)}
                write_result(arguments.out, {"trials": TRIALS, "runs": runs, "machine": machine(torch.device("cpu"))})
    _print([run for run in runs.values() if shared.items() <= run.items()])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", default=",".join(TRIALS), help="comma-separated trials; default: all")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--starts", type=int, default=20, help="number of validation samples that are scored before and after"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--kl-weight", type=float, default=0.2)
    parser.add_argument("--clips", type=int, default=40, help="number of training clips, if datasets are created")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="datasets; created if missing")
    parser.add_argument("--engines-dir", type=Path, default=Path("engines"))
    parser.add_argument("--out", type=Path, default=RESULTS / "trials.json")
    return parser.parse_args()


def _run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        demo = DemoSettings(steps=arguments.steps, starts=arguments.starts, seed=seed)
        values = {**demo_settings(out, arguments.engines_dir, demo).model_dump(mode="json"), **TRIALS[name]}
        for section, part in (("data", "train"), ("validation", "held_out")):
            values[section]["source"] = str(arguments.data / part)
        values["validation"]["lossless"] = False
        values["train"]["learning_rate"], values["kl_weight"] = arguments.learning_rate, arguments.kl_weight
        began = time.process_time()
        run_training(RunSettings.parse(values), None, Progress(quiet=True))
        cpu_seconds = time.process_time() - began
        scores, lines = scores_of(read_lines(out / VALIDATION)), read_lines(out / METRICS)
    return {
        "gain": {name: change["gain"] for name, change in scores["paired"].items()},
        "starts_up": scores["starts_up"],
        "psnr": scores["psnr_after"] - scores["psnr_before"],
        "kl_loss": statistics.mean(line["kl_loss"] for line in lines[-10:]),
        "seconds_per_step": statistics.median(line["seconds"] for line in lines),
        "cpu_seconds": cpu_seconds,
        "verdict": scores["verdict"],
    }


def _print(runs: list[dict[str, Any]]) -> None:
    table = Table(title=f"change by training, {len({run['seed'] for run in runs})} seeds")
    measures = list(dict.fromkeys(name for run in runs for name in run["gain"]))
    for column in ("trial", *measures, "PSNR, dB", "KL at the end", "s/step", "CPU s"):
        table.add_column(column, justify="left" if column == "trial" else "right")
    for trial in dict.fromkeys(run["trial"] for run in runs):
        own = [run for run in runs if run["trial"] == trial]
        cells = [mean_and_deviation([run["gain"][name] for run in own], 4) for name in measures]
        cells += [mean_and_deviation([run[name] for run in own], 4) for name in ("psnr", "kl_loss")]
        cells += [f"{statistics.median(run['seconds_per_step'] for run in own):.2f}"]
        table.add_row(trial, *cells, f"{statistics.median(run['cpu_seconds'] for run in own):.0f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
