"""Validation while training: held-out starts, the same noise every time, pictures and clips to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.report.sheet import SheetRow, contact_sheet
from frostline.train.data import Sample
from frostline.train.evaluation import Evaluation, evaluate
from frostline.train.module import WanTrainingModule
from frostline.train.processes import gather_from_processes, process_count, process_index
from frostline.video import write_video

FOLDER = "validation"
_FPS = 8


@dataclass(frozen=True)
class Validation:
    """What is generated. starts: indices of the dataset. batch_size: per process."""

    dataset: Dataset[Sample]
    starts: Sequence[int]
    batch_size: int = 1
    noise_seed: int = 0


def validate(module: WanTrainingModule, validation: Validation, step: int, output_dir: Path) -> dict[str, Any]:
    """Generate all starts, shared out over the processes; returns the means and each start's figures.

    Writes `validation/step-<step>/contact_sheet.png` and one mp4 a start, truth and generated side by side.
    """
    starts, processes = list(validation.starts), process_count()
    share = -(-len(starts) // processes)
    # All processes generate equally often, as sharded weights demand; who has none left repeats the last.
    own = [starts[min(process_index() * share + i, len(starts) - 1)] for i in range(share)]
    part = evaluate(module, validation.dataset, own, noise_seed=validation.noise_seed, batch_size=validation.batch_size)
    evaluation = _joined(gather_from_processes(part), len(starts))
    if process_index() == 0:
        _draw(validation, evaluation, output_dir / FOLDER / f"step-{step:06d}")
    means = {name: values.mean().item() for name, values in evaluation.measured.items()}
    return {**means, "starts": {name: values.tolist() for name, values in evaluation.measured.items()}}


def _joined(parts: Sequence[Evaluation], count: int) -> Evaluation:
    measured = {name: torch.cat([part.measured[name] for part in parts])[:count] for name in parts[0].measured}
    return Evaluation(measured, torch.cat([part.videos for part in parts])[:count])


def _draw(validation: Validation, evaluation: Evaluation, folder: Path) -> None:
    rows = []
    for row, index in enumerate(validation.starts):
        sample, video = validation.dataset[index], evaluation.videos[row]
        figures = ", ".join(f"{name} {values[row]:.3g}" for name, values in evaluation.measured.items())
        rows.append(SheetRow(f"{sample['prompt']}\n{figures}", {"truth": sample["video"], "generated": video}))
        write_video(folder / f"{row}.mp4", _side_by_side(sample["video"], video), fps=_FPS)
    contact_sheet(rows, folder / "contact_sheet.png")


def _side_by_side(truth: Tensor, generated: Tensor) -> Tensor:
    """Two (T, 3, H, W) videos as one (T, 3, H, 2 W)."""
    return torch.cat([truth, generated], dim=-1)
