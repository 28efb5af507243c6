"""Validation while training: held-out starts, the same noise every time, pictures and clips to look at.

A run folder then holds

    validation/truth/0.mp4, 1.mp4, …            the true clips, without what padded them
    validation/step-000040/0.mp4, 1.mp4, …      what was generated from their first frames at that step
    validation/step-000040/contact_sheet.png    both, one above the other
    validation/step-000040.csv                  their paths and prompts, as `frostline score --pairs` takes them
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.atomic_io import atomic_write
from frostline.errors import TrainingError
from frostline.escaping import csv_cell
from frostline.report.contact_sheet import SheetRow, contact_sheet
from frostline.train.data.dataset import Sample
from frostline.train.loop.evaluation import Evaluation, evaluate
from frostline.train.loop.run_dir import CLIPS, SHEET
from frostline.train.processes import gather_from_processes, process_count, process_index
from frostline.train.step.module import TrainingModule
from frostline.video import write_video

TRUTH = "truth"
_LOSSLESS = "lossless"
_FPS = 8


@dataclass(frozen=True)
class Validation:
    """What is generated.

    starts: indices of the dataset. batch_size: per process. lossless: keep the clips to the bit as well, in folders of
    their own, for few players show them; the csv file then names these.
    """

    dataset: Dataset[Sample]
    starts: Sequence[int]
    batch_size: int = 1
    noise_seed: int = 0
    lossless: bool = False


def validate(
    module: TrainingModule,
    validation: Validation,
    step: int,
    output_dir: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Generate all starts, shared out over the processes; returns the means and each start's figures.

    Args:
        advance: called with the number of starts that this process has just finished.
    Raises:
        TrainingError: what is generated is not finite.
    """
    starts, processes = list(validation.starts), process_count()
    share = -(-len(starts) // processes)
    # All processes generate equally often, as sharded weights demand; who has none left repeats the last.
    own = [starts[min(process_index() * share + i, len(starts) - 1)] for i in range(share)]
    part = evaluate(
        module,
        validation.dataset,
        own,
        noise_seed=validation.noise_seed,
        batch_size=validation.batch_size,
        advance=advance,
    )
    evaluation = _joined(gather_from_processes(part), len(starts))
    if not evaluation.videos.isfinite().all():
        raise TrainingError(
            f"validation at step {step}: the model makes frames that are NaN or infinite, it has diverged: go on from "
            "a checkpoint before (--resume checkpoint-N) with a lower train.learning_rate"
        )
    if process_index() == 0:
        _write(validation, evaluation, output_dir / CLIPS, step_name(step))
    means = {name: values.nanmean().item() for name, values in evaluation.measured.items()}
    return {**means, "starts": {name: values.tolist() for name, values in evaluation.measured.items()}}


def step_name(step: int) -> str:
    """What the files of a step go by."""
    return f"step-{step:06d}"


def _joined(parts: Sequence[Evaluation], count: int) -> Evaluation:
    measured = {name: torch.cat([part.measured[name] for part in parts])[:count] for name in parts[0].measured}
    return Evaluation(measured, torch.cat([part.videos for part in parts])[:count])


def _write(validation: Validation, evaluation: Evaluation, folder: Path, name: str) -> None:
    strips, pairs = [], []
    for row, index in enumerate(validation.starts):
        sample, video = validation.dataset[index], evaluation.videos[row]
        figures = ", ".join(f"{name} {values[row]:.3g}" for name, values in evaluation.measured.items())
        strips.append(SheetRow(f"{sample['prompt']}\n{figures}", {"truth": sample["video"], "generated": video}))
        true = sample["video"][: sample.get("valid_frames")]
        truth = _write_clip(folder / TRUTH, row, true, validation.lossless)
        generated = _write_clip(folder / name, row, video, validation.lossless)
        pairs.append([generated.relative_to(folder), truth.relative_to(folder), csv_cell(sample["prompt"])])
    contact_sheet(strips, folder / name / SHEET)
    with atomic_write(folder / f"{name}.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["video", "reference", "prompt"], *pairs])


def _write_clip(folder: Path, row: int, video: Tensor, lossless: bool) -> Path:
    """The file that is nearest to `video`."""
    clip = write_video(folder / f"{row}.mp4", video, fps=_FPS)
    return write_video(folder / _LOSSLESS / f"{row}.mp4", video, fps=_FPS, lossless=True) if lossless else clip
