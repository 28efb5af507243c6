"""Show the validation samples of a run: those with the worst and best changes as clips, and all in a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.escaping import text_of_csv_cell
from frostline.report.comparison import Comparison, ScoreChange
from frostline.report.contact_sheet import SheetRow, contact_sheet
from frostline.report.formatting import NONE, Trend, fixed, number_of, signed
from frostline.report.page import Cell, Column, Page
from frostline.train.judging.verdict import change_of
from frostline.train.loop.evaluation import PSNR
from frostline.train.loop.run_dir import CLIPS, SHEET
from frostline.train.loop.validation import TRUTH, step_name
from frostline.train.report.measures import Lines, Measures, label
from frostline.video import read_video

_SHOWN = 6
_CAPTION = (
    "Values of the last validation. Change: since the first validation; for measures of single frames, over the frames "
    "that were scored both times. Click a heading to sort."
)


@dataclass(frozen=True)
class _Sample:
    """One validation sample.

    Attributes:
        number: the index of the sample.
        prompt: the text prompt.
        note: a remark if its change is the largest or smallest of all samples.
        clips: the files by label: first validation, last validation and true clip.
        steps: the lines of validation.jsonl by label.
    """

    number: int
    prompt: str
    note: str
    clips: Mapping[str, Path]
    steps: Mapping[str, Mapping[str, Any]]


def show_samples(page: Page, run: Path, validation: Lines, measures: Measures) -> None:
    """Show a few samples as clips and frames (also written to `run/contact_sheet.png`), and all in a table."""
    prompts = _prompts(run / CLIPS / f"{step_name(int(validation[-1]['step']))}.csv")
    name = measures.rewards[0] if measures.rewards else ""
    samples = _shown_samples(run, validation, prompts, _differences(validation, name))
    for sample in samples:
        page.comparison(_comparison(sample, validation, measures, name))
    if samples:
        contact_sheet([_sheet_row(sample, measures, name) for sample in samples], run / SHEET)
    _show_table(page, validation, measures, prompts)


def _shown_samples(run: Path, validation: Lines, prompts: Sequence[str], differences: Sequence[float]) -> list[_Sample]:
    """Return the shown samples: worst change, best change, next worst, and so on; without changes, the first ones."""
    folder, samples = run / CLIPS, []
    lines = {int(line["step"]): line for line in (validation[0], validation[-1])}
    for number, note in _order(len(prompts), differences)[:_SHOWN]:
        # The paths in the CSV file are not used, so that the page only contains files of the run.
        places = {f"step {step}": folder / step_name(step) / f"{number}.mp4" for step in sorted(lines)}
        clips = {**places, "truth": folder / TRUTH / f"{number}.mp4"}
        steps = {f"step {step}": line for step, line in lines.items()}
        there = {each: clip for each, clip in clips.items() if clip.is_file()}
        if there:
            samples.append(_Sample(number, prompts[number], note, there, steps))
    return samples


def _order(count: int, differences: Sequence[float]) -> list[tuple[int, str]]:
    """Return the indices of samples in the order in which they are shown, each with a remark on its change."""
    changed = [number for number in range(min(count, len(differences))) if not math.isnan(differences[number])]
    ranked = sorted(changed, key=lambda number: differences[number])
    notes = {}
    for rank, number in enumerate(ranked):
        fell = differences[number] < 0
        if rank == 0:
            notes[number] = "the largest decrease" if fell else "the smallest increase"
        elif rank == len(ranked) - 1:
            notes[number] = "the smallest decrease" if fell else "the largest increase"
    order = []
    while ranked:
        order.append(ranked.pop(0))
        order += [ranked.pop()] if ranked else []
    order += [number for number in range(count) if number not in order]
    return [(number, notes.get(number, "")) for number in order]


def _comparison(sample: _Sample, validation: Lines, measures: Measures, name: str) -> Comparison:
    note = " · ".join(filter(None, (f"sample {sample.number}", sample.note)))
    shown = [*measures.rewards, *measures.judges, *(each for each in measures.others if each == PSNR)]
    scores = [_score_change(validation, each, sample.number, each != PSNR) for each in shown]
    values = {each: _start(line, name, sample.number) for each, line in sample.steps.items()}
    captions = {each: f"· {fixed(value, 3)}" for each, value in values.items() if value is not None}
    return Comparison.of(sample.prompt, note, sample.clips, scores, _frame_scores(sample, name), captions)


def _sheet_row(sample: _Sample, measures: Measures, name: str) -> SheetRow:
    values = [fixed(_start(line, name, sample.number), 3) for line in sample.steps.values()]
    caption = f"{sample.prompt}\n{label(name)} {' → '.join(values)}" if name else sample.prompt
    strips = {each: read_video(clip) for each, clip in sample.clips.items()}
    scores = {each: scored for each, scored in _frame_scores(sample, name).items() if each in strips}
    fitting = {each: scored for each, scored in scores.items() if len(scored) == len(strips[each])}
    return SheetRow(caption, strips, fitting)


def _frame_scores(sample: _Sample, name: str) -> dict[str, Sequence[float | None]]:
    """Return the frame scores of each clip by label; clips without frame scores are left out."""
    found = {}
    for each, line in sample.steps.items():
        frames = line.get("frames", {}).get(name, [])
        if sample.number < len(frames):
            found[each] = frames[sample.number]
    return found


def _score_change(validation: Lines, name: str, number: int, higher_is_better: bool) -> ScoreChange:
    before, after = (_start(line, name, number) for line in (validation[0], validation[-1]))
    digits = 2 if name == PSNR else 3
    differences = _differences(validation, name)
    change = differences[number] if number < len(differences) else math.nan
    if len(validation) < 2 or math.isnan(change):
        return ScoreChange(label(name), "" if len(validation) < 2 else fixed(before, digits), fixed(after, digits))
    trend: Trend = "same" if not higher_is_better or round(change, digits) == 0 else "better" if change > 0 else "worse"
    said = signed(change, digits)
    if before is not None and after is not None and abs(after - before - change) >= 0.5 * 10**-digits:
        said += " in the frames scored both times"
    return ScoreChange(label(name), fixed(before, digits), fixed(after, digits), said, trend)


def _show_table(page: Page, validation: Lines, measures: Measures, prompts: Sequence[str]) -> None:
    last = validation[-1].get("starts", {})
    compared = [name for name in (*measures.rewards, *measures.judges) if name in last]
    others = [name for name in measures.of_rewards if name in last]
    count = max((len(values) for values in last.values()), default=0)
    if not count:
        return
    columns = [Column("Sample", "right"), *([Column("Prompt")] if prompts else [])]
    for name in compared:
        columns += [Column(label(name), "right"), Column("Change", "right")]
    columns += [Column(label(name), "right") for name in others]
    differences = {name: _differences(validation, name) for name in compared}
    rows = []
    for number in range(count):
        cells: list[str | Cell] = [Cell(str(number), number)]
        cells += [Cell(prompts[number] if number < len(prompts) else NONE, muted=True)] if prompts else []
        for name in compared:
            value, changes = _start(validation[-1], name, number), differences[name]
            change = changes[number] if number < len(changes) else math.nan
            cells += [Cell(fixed(value, 3), value), Cell(signed(change, 3), change)]
        values = {name: _start(validation[-1], name, number) for name in others}
        cells += [Cell(fixed(value, 2 if name == PSNR else 3), value) for name, value in values.items()]
        rows.append(cells)
    page.subheading("All samples")
    page.table(columns, rows, caption=_CAPTION)


def _differences(validation: Lines, name: str) -> tuple[float, ...]:
    change = change_of(validation, name)
    return () if change is None else change.gain.differences


def _start(line: Mapping[str, Any], name: str, number: int) -> float | None:
    values = line.get("starts", {}).get(name, [])
    return number_of({name: values[number]}, name) if number < len(values) else None


def _prompts(pairs: Path) -> list[str]:
    if not pairs.is_file():
        return []
    with pairs.open(newline="", encoding="utf-8") as file:
        return [text_of_csv_cell(row.get("prompt") or "") for row in csv.DictReader(file)]
