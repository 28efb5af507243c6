"""The part of a run's report about its held-out starts: what was gained, pictures and clips to compare."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from frostline.escaping import text_of_csv_cell
from frostline.report.contact_sheet import SheetRow, contact_sheet
from frostline.report.formatting import change_tile, fixed, number_of
from frostline.report.page import Figure, Page, Tile, Trend
from frostline.report.plots import line_plot, paired_plot
from frostline.train.judging.verdict import Change, change_of, signed
from frostline.train.loop.run_dir import CLIPS, SHEET
from frostline.train.loop.validation import TRUTH, step_name
from frostline.train.report.measures import Lines, Measures, label
from frostline.video import read_video

_SHOWN_STARTS = 5
_TRENDS: Mapping[str, Trend] = {"rises": "better", "falls": "worse"}


def outcome(validation: Lines, measures: Measures) -> str:
    """What became of the held-out starts, in a sentence, whichever way it went; nothing before the second look."""
    if len(validation) < 2 or not measures.rewards:
        return ""
    name = measures.rewards[0]
    first, last = number_of(validation[0], name), number_of(validation[-1], name)
    words = f" {label(name)} of the held-out starts: {fixed(first, 3)} at step {validation[0]['step']}, "
    words += f"{fixed(last, 3)} now"
    change = change_of(validation, name)
    if change is None or not change.gain.starts:
        return f"{words}."
    return f"{words}; it went up in {change.gain.starts_up} of {change.gain.starts}."


def tiles(validation: Lines, measures: Measures) -> list[Tile]:
    """How each measure changed from the first look to the last; those that only judges give beside their score not."""
    found = []
    for name in (*measures.rewards, *measures.judges, *measures.of_rewards):
        change = change_of(validation, name)
        found.append(_tile(validation, name, change, measures))
        if name == next(iter(measures.rewards), "") and change is not None and change.gain.starts:
            up, note = change.gain.starts_up, "Held-out starts, not used in training, that score higher than before it."
            found.append(Tile("Starts that improved", str(up), f"of {change.gain.starts}", note=note))
    return found


def _tile(validation: Lines, name: str, change: Change | None, measures: Measures) -> Tile:
    """A figure: the means of both looks, and the paired change. Only of rewards and judges is higher better."""
    before, after = number_of(validation[0], name), number_of(validation[-1], name)
    digits = 2 if max(abs(before), abs(after)) >= 10 else 3
    trend: Trend = "same"
    note = measures.about.get(name, "")
    if name in measures.judges:
        note = f"Training never sees it. {note}".strip()
    if change is not None and name in (*measures.rewards, *measures.judges):
        trend = _TRENDS.get(change.direction, "same")
    if change is not None and change.gain_missing_zero is not None and change.gain.starts:
        zero = signed(change.gain_missing_zero.gain)
        note += f" Of the {change.gain.frames} frames that were scored both times: {signed(change.gain.gain)}; of all, "
        note += f"with 0 where there was no score: {zero}."
    if len(validation) < 2:
        return Tile(label(name), fixed(after, digits), note=note)
    return change_tile(label(name), before, after, digits, note.strip(), trend=trend)


def show_held_out(page: Page, run: Path, validation: Lines, measures: Measures) -> None:
    """The curves, a contact sheet (also written to `run/contact_sheet.png`) and clips."""
    page.heading("Held-out starts")
    page.paragraph(
        "Each clip is generated from a first frame that the training never saw, and a prompt, with the same noise "
        "every time. The further from that frame, the more a model forgets whom it shows."
    )
    starts = _shown_starts(run, validation)
    if starts:
        strips = {name: "Frames" for start in starts for name in start.clips}
        rows = [SheetRow(s.prompt, {name: read_video(clip) for name, clip in s.clips.items()}) for s in starts]
        sheet = contact_sheet(rows, run / SHEET)
        page.figures(Figure.image(sheet, f"Frames of held-out clips in rows: {', '.join(strips)}", wide=True))
        clips = [
            Figure.video(clip, f"Start {start.number}: {name}", name)
            for start in starts
            for name, clip in start.clips.items()
        ]
        page.figures(*clips, columns=2 * len(strips), narrow_columns=len(strips))
    page.figures(*_curves(validation, measures), columns=2)


@dataclass(frozen=True)
class _Start:
    """clips: truth, at the first look, at the last."""

    number: int
    prompt: str
    clips: Mapping[str, Path]


def _shown_starts(run: Path, validation: Lines) -> list[_Start]:
    """A few, evenly spaced, as far as their clips are there."""
    folder, steps = run / CLIPS, sorted({int(line["step"]) for line in (validation[0], validation[-1])})
    prompts = _prompts(folder / f"{step_name(steps[-1])}.csv")
    count = min(_SHOWN_STARTS, len(prompts))
    starts = []
    for number in (index * len(prompts) // count for index in range(count)):
        # By their place, not by what the file says: a page must take up nothing from outside the run.
        clips = {"truth": folder / TRUTH / f"{number}.mp4"}
        clips |= {f"step {step}": folder / step_name(step) / f"{number}.mp4" for step in steps}
        starts.append(_Start(number, prompts[number], {name: clip for name, clip in clips.items() if clip.is_file()}))
    return [start for start in starts if start.clips]


def _prompts(pairs: Path) -> list[str]:
    if not pairs.is_file():
        return []
    with pairs.open(newline="", encoding="utf-8") as file:
        return [text_of_csv_cell(row.get("prompt") or "") for row in csv.DictReader(file)]


def _curves(validation: Lines, measures: Measures) -> list[Figure]:
    steps = [number_of(line, "step") for line in validation]
    figures = []
    for name in (*measures.rewards, *measures.judges, *measures.others):
        title = label(name)
        first, last = (line.get("starts", {}).get(name, []) for line in (validation[0], validation[-1]))
        if len(validation) == 2 and len(first) == len(last):
            plot = paired_plot(first, last, labels=(f"step {steps[0]:.0f}", f"step {steps[-1]:.0f}"), ylabel=title)
            caption = "One line a start. The short bars are the means; a dashed line is a start whose value fell."
        else:
            values = [number_of(line, name) for line in validation]
            plot, caption = line_plot({title: values}, x=steps, xlabel="training step", ylabel=title), ""
        figures.append(Figure.svg(plot, alt=f"{title} of the held-out starts", title=title, caption=caption))
    return figures
