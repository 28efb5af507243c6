"""Run `frostline demo`: export, training, validation and timing with the built-in tiny model."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frostline.atomic_io import atomic_write
from frostline.demo.dataset import write_datasets
from frostline.demo.timing import time_steps
from frostline.export.exporter import export_stage
from frostline.package_info import package_folder
from frostline.progress import Progress
from frostline.runtime.backends import DEFAULT_BACKEND
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.data.dataset import collate
from frostline.train.judging.verdict import changes_of, verdict
from frostline.train.launch import build_module, run_training
from frostline.train.loop.run_dir import ADAPTER, TIMING, VALIDATION, read_lines
from frostline.train.loop.trainer import TrainOutcome
from frostline.train.report.page import write_report
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

_BATCH_SIZE = 2
_TRAIN_CLIPS, _NUM_FRAMES = 40, 9
_JUDGE = {"type": "face_identity", "detector": "yunet", "embedder": "dlib"}
_JUDGE_PACKAGE = "face_recognition_models"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Attributes:
        steps: the number of optimizer steps.
        starts: the number of validation samples.
        seed: the random seed of training.
        timed_rounds: the number of rounds of the comparison with PyTorch.
    """

    steps: int = 80
    starts: int = 20
    seed: int = 0
    timed_rounds: int = 5


def demo_settings(out: Path, engines: Path, settings: DemoSettings) -> RunSettings:
    """Return the training settings of the demo: the recipe `tiny`, with a validation of all samples before and after.

    If the package with dlib's weights is installed, a judge with other face networks than the reward is added.
    """
    return RunSettings.parse(
        {
            "model": "tiny",
            "output_dir": out,
            "overwrite_output_dir": True,
            "device": "cpu",
            "noise_seed": None,
            "kl_weight": 0.1,
            "lora": {"rank": 8},
            "data": {"source": out / "data" / "train", "num_frames": _NUM_FRAMES},
            "validation": {
                "source": out / "data" / "held_out",
                "num_frames": _NUM_FRAMES,
                "steps": settings.steps,
                "num_videos": settings.starts,
                "batch_size": 5,
                "lossless": True,
                "judges": [_JUDGE] if package_folder(_JUDGE_PACKAGE) else [],
            },
            "train": {
                "learning_rate": 5e-3,
                "max_train_steps": settings.steps,
                "per_device_train_batch_size": _BATCH_SIZE,
                "checkpointing_steps": 20,
                "save_total_limit": 2,
                "seed": settings.seed,
            },
            "plan": {"engines": engines},
        }
    )


def run_demo(
    out: Path, engines: Path, settings: DemoSettings, progress: Progress
) -> tuple[TrainOutcome, dict[str, Any]]:
    """Write the data, export engines, train, compare the step time with PyTorch, and write all results to `out`.

    Returns:
        The outcome of the run, and the content of `summary.json`, which is empty if a signal stopped the run.
    """
    begin = time.monotonic()
    with progress.task("write the dataset"):
        write_datasets(out / "data", _TRAIN_CLIPS, settings.starts)
    run = demo_settings(out, engines, settings)
    with progress.task("load the tiny model"):
        module = build_module(run, torch.device("cpu"))
    _export(module, EngineStore(engines), progress)
    if not run.validation.judges:
        log.warning(
            "the demo runs without a judge, because dlib's weights are not installed: pip install 'frostline[dlib]'"
        )
    outcome = run_training(run, None, progress)
    if outcome.stopped_by is not None:
        return outcome, {}
    with progress.task("compare the step time with torch"):
        timing = _time(module, run, settings.timed_rounds)
    _write_json(out / TIMING, timing)
    write_report(out)
    summary = {
        **scores_of(read_lines(out / VALIDATION)),
        **{f"step_ms_{name}": value for name, value in timing["step_ms"].items()},
        "seconds": time.monotonic() - begin,
    }
    _write_json(out / SUMMARY, summary)
    return outcome, summary


def _export(module: WanTrainingModule, store: EngineStore, progress: Progress) -> None:
    """Build the missing engines."""
    with progress.bar("export engines", len(module.stages)) as bar:
        for name, stage in module.stages.items():
            export_stage(
                stage, DEFAULT_BACKEND, store, progress=lambda step, name=name: bar.describe(f"{name}: {step}")
            )
            bar.advance(1)


def _time(module: WanTrainingModule, run: RunSettings, rounds: int) -> dict[str, Any]:
    """Return the content of `timing.json`: the duration of a step of the trained model, with and without engines."""
    module.load_adapter(run.output_dir / ADAPTER)
    module.runtime.replan(run.plan.as_plan())
    dataset = run.data.open()
    return asdict(time_steps(module, collate([dataset[index] for index in range(_BATCH_SIZE)]), rounds))


def scores_of(validation: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the measures of the first and the last validation, the paired changes, and the verdict."""
    before, after = validation[0], validation[-1]
    measures = [name for name in after["starts"] if name in before["starts"]]
    scores: dict[str, Any] = {}
    for when, line in (("before", before), ("after", after)):
        scores |= {f"{name}_{when}": line[name] for name in measures}
        scores[f"face_scores_{when}"] = line["starts"]["face_score"]
    changes = changes_of(validation)
    return {
        **scores,
        "paired": {name: changes[name].as_line() for name in (*after["rewards"], *after["judges"]) if name in changes},
        "starts": len(after["starts"]["face_score"]),
        "starts_up": changes["face_score"].gain.starts_up,
        "verdict": verdict(validation).sentence,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
