"""Validate during training: generate the validation samples with fixed noise, measure them, and write clips and tables.

Validation writes these files into the folder of a run:

- `validation/truth/0.mp4`, …: the true clips without padding, for samples that have a clip.
- `validation/reference/0.mp4`, …: the reference pictures as frames, for samples that have pictures.
- `validation/step-000040/0.mp4`, …: the clips generated at that step.
- `validation/step-000040/contact_sheet.png`: frames of the true and the generated clips.
- `validation/step-000040.csv`: paths, prompts and measures, in the format of `frostline score --pairs`. The column
  `reference` names the file of pictures, otherwise the true clip; it is empty if there is neither.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from frostline.atomic_io import atomic_write
from frostline.errors import TrainingError
from frostline.escaping import csv_cell
from frostline.report.contact_sheet import SheetRow, contact_sheet
from frostline.train.data.dataset import Sample
from frostline.train.judging.judge import Judge
from frostline.train.loop.evaluation import Evaluation, evaluate, pairing_keys
from frostline.train.loop.run_dir import CLIPS, SHEET
from frostline.train.processes import gather_from_processes, process_count, process_index
from frostline.train.settings import ValidationSettings
from frostline.train.step.module import TrainingModule
from frostline.video import write_video

TRUTH, REFERENCE = "truth", "reference"
_LOSSLESS = "lossless"
_FPS = 8
# Decimal digits of frame scores: far below the differences between engines.
_DIGITS = 6


@dataclass(frozen=True)
class Validation:
    """The samples and judges of a validation.

    Attributes:
        starts: indices of the samples in the dataset.
        batch_size: number of videos that a process generates together.
        lossless: also write lossless clips to separate folders, because few players support them; the csv file then
            names these.
        judges: rewards that score the videos but are not trained on.
    """

    dataset: Dataset[Sample]
    starts: Sequence[int]
    batch_size: int = 1
    noise_seed: int = 0
    lossless: bool = False
    judges: tuple[Judge, ...] = ()


def validate(
    module: TrainingModule,
    validation: Validation,
    step: int,
    output_dir: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Generate all samples, distributed over the processes; return the means and the input of `train.judging.verdict`.

    Args:
        advance: called with the number of samples that this process has just finished.
    Raises:
        TrainingError: generated values are not finite.
    """
    starts = list(validation.starts)
    own = own_starts(starts, process_index(), process_count())
    part = evaluate(
        module,
        validation.dataset,
        own,
        noise_seed=validation.noise_seed,
        batch_size=validation.batch_size,
        judges=validation.judges,
        advance=advance,
    )
    evaluation = Evaluation.join(gather_from_processes(part), len(starts))
    if not evaluation.videos.isfinite().all():
        raise TrainingError(
            f"validation at step {step}: the model generates NaN or infinite frames, so it has "
            "diverged: resume from an earlier checkpoint (--resume checkpoint-N) with a lower "
            "train.learning_rate"
        )
    if process_index() == 0:
        _write(validation, evaluation, output_dir / CLIPS, step_name(step))
    means = {name: values.nanmean().item() for name, values in evaluation.measured.items()}
    return {
        **means,
        "rewards": [*evaluation.rewards],
        "judges": [*evaluation.judges],
        "starts": {name: values.tolist() for name, values in evaluation.measured.items()},
        "frames": {name: _rounded(values) for name, values in evaluation.frames.items()},
        "pairing": pairing_keys(evaluation, validation.noise_seed),
    }


def starts_of(settings: ValidationSettings, dataset: Dataset[Sample]) -> Validation:
    """Return the validation that the settings describe, with the first samples of `dataset` and without judges."""
    starts = range(min(settings.num_videos, len(dataset)))  # type: ignore[arg-type]
    return Validation(dataset, starts, settings.batch_size, settings.noise_seed, settings.lossless)


def own_starts(starts: Sequence[int], process: int, processes: int) -> list[int]:
    """Return the samples that one of several processes generates."""
    share = -(-len(starts) // processes)
    # All processes generate equally often, which sharded weights require; a process without samples repeats the last
    # one.
    return [starts[min(process * share + i, len(starts) - 1)] for i in range(share)]


def step_name(step: int) -> str:
    """Return the name of a step's files."""
    return f"step-{step:06d}"


def _rounded(frames: Tensor) -> list[list[float]]:
    return [[float(f"{score:.{_DIGITS}g}") for score in video] for video in frames.tolist()]


def _write(validation: Validation, evaluation: Evaluation, folder: Path, name: str) -> None:
    strips, pairs = [], []
    for row, index in enumerate(validation.starts):
        sample, video = validation.dataset[index], evaluation.videos[row]
        figures = {name: values[row].item() for name, values in evaluation.measured.items()}
        true, pictures = sample["video"][: sample.get("valid_frames")], sample.get("reference")
        shown = {"truth": sample["video"], "generated": video} if len(true) else {"generated": video}
        caption = f"{sample['prompt']}\n{_caption(figures, evaluation.judges)}"
        strips.append(SheetRow(caption, shown, _frame_scores(evaluation, row)))
        written = {REFERENCE: pictures, TRUTH: true if len(true) else None}
        references = [
            _write_clip(folder / kind, row, frames, validation.lossless).relative_to(folder)
            for kind, frames in written.items()
            if frames is not None
        ]
        generated = _write_clip(folder / name, row, video, validation.lossless)
        paths = (generated.relative_to(folder), *(references[:1] or [""]))
        pairs.append([*paths, csv_cell(sample["prompt"]), *(f"{value:.6g}" for value in figures.values())])
    contact_sheet(strips, folder / name / SHEET)
    with atomic_write(folder / f"{name}.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["video", "reference", "prompt", *evaluation.measured], *pairs])


def _frame_scores(evaluation: Evaluation, row: int) -> dict[str, list[float | None]]:
    """Return the first reward's scores of the generated frames; empty if it does not score all frames."""
    scores = evaluation.frames.get(next(iter(evaluation.rewards), ""))
    if scores is None or scores.shape[1] != evaluation.videos.shape[1]:
        return {}
    return {"generated": [None if math.isnan(score) else score for score in scores[row].tolist()]}


def _caption(figures: Mapping[str, float], judges: Sequence[str]) -> str:
    """Return the measures of a sample as text, with the measures of judges on a separate line."""
    of_judges = {name: value for name, value in figures.items() if name.startswith(tuple(judges))}
    lines = ({name: value for name, value in figures.items() if name not in of_judges}, of_judges)
    return "\n".join(", ".join(f"{name} {value:.3g}" for name, value in line.items()) for line in lines if line)


def _write_clip(folder: Path, row: int, video: Tensor, lossless: bool) -> Path:
    """Write a clip; return its path, or that of its lossless version if there is one."""
    clip = write_video(folder / f"{row}.mp4", video, fps=_FPS)
    return write_video(folder / _LOSSLESS / f"{row}.mp4", video, fps=_FPS, lossless=True) if lossless else clip
