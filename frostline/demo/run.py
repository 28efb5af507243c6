"""`frostline demo`: the main job end to end on the embedded tiny model."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostline.demo.dataset import write_clips, write_datasets
from frostline.demo.report import write_demo_report
from frostline.demo.timing import Timing, time_steps
from frostline.export.exporter import export_stage
from frostline.progress import Progress
from frostline.report.sheet import SheetRow, contact_sheet
from frostline.report.writing import written_whole
from frostline.runtime.backends import TORCH
from frostline.runtime.heap import keep_freed_memory
from frostline.runtime.store import EngineStore
from frostline.train.configfile import dump_settings
from frostline.train.data import VideoPromptDataset, collate
from frostline.train.evaluation import Evaluation, evaluate
from frostline.train.launch import run_facts
from frostline.train.module import WanTrainingModule
from frostline.train.settings import RunSettings
from frostline.train.trainer import RunOptions, train
from frostline.video import write_video

log = logging.getLogger(__name__)

_BACKEND = "onnxruntime"
_MODULE_SETTINGS: dict[str, Any] = {"lora": {"rank": 8}, "kl_weight": 0.2, "noise_seed": None}
_LEARNING_RATE = 3e-3
_BATCH_SIZE = 2
_TRAIN_CLIPS = 40
# One start of each motion, two people.
_SHOWN = (0, 6, 2, 8, 4)


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does. steps: optimizer steps. starts: held-out clips. timed_rounds: of the comparison."""

    steps: int = 40
    starts: int = 20
    seed: int = 0
    timed_rounds: int = 5


def demo_settings(steps: int, seed: int) -> RunSettings:
    """The settings of the demo's training: those of examples/tiny.yaml."""
    trainer = {
        "learning_rate": _LEARNING_RATE,
        "max_train_steps": steps,
        "per_device_train_batch_size": _BATCH_SIZE,
        "seed": seed,
    }
    return RunSettings.parse({"model": "tiny", **_MODULE_SETTINGS, "data": {"num_frames": 9}, "train": trainer})


def run_demo(out: Path, engines: Path, settings: DemoSettings, progress: Progress) -> dict[str, Any]:
    """Make data, export engines, train, measure, and write everything to `out`; returns `summary.json`'s content."""
    begin = time.monotonic()
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    with progress.task("write the dataset"):
        train_file, held_out_file = write_datasets(out / "data", _TRAIN_CLIPS, settings.starts)
    train_data, held_out = VideoPromptDataset(train_file, num_frames=9), VideoPromptDataset(held_out_file, num_frames=9)
    torch.manual_seed(settings.seed)
    with progress.task("load the tiny model"):
        module = WanTrainingModule.from_pretrained("tiny", engines=engines, plan=TORCH, **_MODULE_SETTINGS)
    parity = _export(module, EngineStore(engines), progress)
    module.runtime.replan("auto")
    before = _evaluate(module, held_out, settings.starts, "score before", progress)
    _train(module, train_data, settings, out, progress)
    after = _evaluate(module, held_out, settings.starts, "score after", progress)
    with progress.task("time hybrid against torch"):
        batch = collate([train_data[index] for index in range(_BATCH_SIZE)])
        timing = time_steps(module, batch, settings.timed_rounds)
    summary = {
        **_scores(before, after),
        "step_ms_hybrid": timing.step_ms["hybrid"],
        "step_ms_hybrid_uncached": timing.step_ms["hybrid_uncached"],
        "step_ms_torch": timing.step_ms["torch"],
        "stages": _stage_rows(module, timing, parity),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": _versions(),
        "settings": {**_MODULE_SETTINGS, "learning_rate": _LEARNING_RATE, "steps": settings.steps},
    }
    with progress.task("draw"):
        _draw(out, held_out, before, after)
        for name, evaluation in (("before", before), ("after", after)):
            write_clips(out, name, evaluation.videos, held_out_file)
    summary["seconds"] = time.monotonic() - begin
    _write_results(out, summary)
    return summary


def _export(module: WanTrainingModule, store: EngineStore, progress: Progress) -> dict[str, float]:
    """Build the missing engines; returns the largest error against torch of each stage."""
    worst = {}
    with progress.bar("export engines", len(module.stages)) as bar:
        for name, stage in module.stages.items():
            exported = export_stage(
                stage, _BACKEND, store, progress=lambda step, name=name: bar.describe(f"{name}: {step}")
            )
            worst[name] = exported.worst.max_abs
            bar.advance(1)
    return worst


def _evaluate(
    module: WanTrainingModule, held_out: VideoPromptDataset, starts: int, what: str, progress: Progress
) -> Evaluation:
    with progress.bar(what, starts) as bar:
        return evaluate(module, held_out, range(starts), advance=bar.advance)


def _train(
    module: WanTrainingModule, dataset: VideoPromptDataset, settings: DemoSettings, out: Path, progress: Progress
) -> None:
    run = demo_settings(settings.steps, settings.seed)
    with progress.bar("train the LoRA", settings.steps) as bar:

        def on_step(metrics: dict[str, Any]) -> None:
            bar.describe(f"face score {metrics['face_score']:.3f}, KL {metrics['kl_loss']:.4f}")
            bar.advance(1)

        options = RunOptions(overwrite=True, config=dump_settings(run), facts=run_facts(module), on_step=on_step)
        train(module, dataset, run.train, out, options)


def _scores(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    gains = after.measured["face_score"] - before.measured["face_score"]
    scores: dict[str, Any] = {"starts": len(gains), "starts_up": int((gains > 0).sum())}
    for when, evaluation in (("before", before), ("after", after)):
        scores[f"face_scores_{when}"] = evaluation.measured["face_score"].tolist()
        for name in ("face_score", "detection_rate", "psnr"):
            scores[f"{name}_{when}"] = evaluation.measured[name].mean().item()
    return scores


def _stage_rows(module: WanTrainingModule, timing: Timing, parity: Mapping[str, float]) -> list[dict[str, Any]]:
    """Frozen stages as planned, then what is live; milliseconds within one timed step, nothing recalled."""
    hybrid, in_torch = timing.stage_ms["hybrid_uncached"], timing.stage_ms["torch"]
    rows = []
    for name, choice in module.runtime.plan.items():
        on_engine = choice.backend != TORCH
        rows.append(
            {
                "stage": name,
                "use": "frozen",
                "backend": choice.backend,
                "hybrid_ms": hybrid.get(name),
                "torch_ms": in_torch.get(name),
                "parity_max_abs": parity.get(name) if on_engine else None,
                "reason": choice.reason,
            }
        )
    for name in in_torch:
        if name not in module.stages:
            rows.append(
                {
                    "stage": name,
                    "use": "live",
                    "backend": TORCH,
                    "hybrid_ms": hybrid.get(name),
                    "torch_ms": in_torch[name],
                    "parity_max_abs": None,
                    "reason": "carries gradient",
                }
            )
    return rows


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("frostline", "torch", "diffsynth", "peft", "onnx", "onnxruntime-gpu")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _draw(out: Path, held_out: VideoPromptDataset, before: Evaluation, after: Evaluation) -> None:
    shown = [index for index in _SHOWN if index < len(before.videos)]
    rows = []
    for index in shown:
        sample = held_out[index]
        scores = " → ".join(f"{evaluation.measured['face_score'][index]:.2f}" for evaluation in (before, after))
        strips = {"truth": sample["video"], "before": before.videos[index], "after": after.videos[index]}
        rows.append(SheetRow(f"{sample['prompt']}, face score {scores}", strips))
    contact_sheet(rows, out / "contact_sheet.png")
    truth = torch.stack([held_out[index]["video"] for index in shown])
    for name, videos in (("truth", truth), ("before", before.videos[shown]), ("after", after.videos[shown])):
        write_video(out / f"{name}.mp4", _side_by_side(videos), fps=8)


def _side_by_side(videos: Tensor) -> Tensor:
    """(N, T, 3, H, W) as one video (T, 3, H, N W)."""
    return torch.cat(list(videos), dim=-1)


def _write_results(out: Path, summary: dict[str, Any]) -> None:
    with written_whole(out / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    metrics: Sequence[Any] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clips = {name: out / f"{name}.mp4" for name in ("truth", "before", "after")}
    write_demo_report(out / "report.html", summary, metrics, out / "contact_sheet.png", clips)
