"""The part of a run's report about its held-out starts: what was gained, pictures and clips to compare."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.escaping import text_of_csv_cell
from frostline.report.contact_sheet import SheetRow, contact_sheet
from frostline.report.formatting import change_tile, fixed, number_of
from frostline.report.page import Figure, Page, Tile
from frostline.report.plots import line_plot, paired_plot
from frostline.train.loop.run_dir import CLIPS, SHEET
from frostline.train.loop.validation import TRUTH, step_name
from frostline.video import read_video

_SHOWN_STARTS = 5
_SCORES = {
    "face_score": (
        "Face score",
        3,
        "",
        "How alike the faces in the generated frames and in the true clip are, as a cosine: "
        "1 is the same picture, 0.2 a stranger.",
    ),
    "detection_rate": (
        "Detection rate",
        3,
        "",
        "Share of the generated frames in which a face is found. Only those are scored, so this must not fall: "
        "hiding the face is no way to keep it.",
    ),
    "psnr": (
        "PSNR to truth",
        2,
        "dB",
        "How near the pixels are to those of the true clip, in decibels; higher is nearer. "
        "A clear fall would mean that the reward was won by spoiling the picture.",
    ),
}

Lines = Sequence[Mapping[str, Any]]
"""Those of validation.jsonl, at least one."""


def outcome(validation: Lines) -> str:
    """What became of the held-out starts, in a sentence, whichever way it went; nothing before the second look."""
    if len(validation) < 2:
        return ""
    name = _leading_score(validation)
    first, last = number_of(validation[0], name), number_of(validation[-1], name)
    label = _SCORES[name][0] if name in _SCORES else name
    words = f" {label} of the held-out starts: {fixed(first, 3)} at step {validation[0]['step']}, {fixed(last, 3)} now"
    up, starts = _starts_up(validation, name)
    return f"{words}; it went up in {up} of {starts}." if starts else f"{words}."


def tiles(validation: Lines) -> list[Tile]:
    """How each measure changed from the first look to the last."""
    first, last = validation[0], validation[-1]
    found = []
    for name, (label, digits, unit, note) in _SCORES.items():
        if name in last:
            tolerance = 0.3 if unit else 0.0
            found.append(
                change_tile(label, number_of(first, name), number_of(last, name), digits, note, unit, tolerance)
            )
    up, starts = _starts_up(validation, _leading_score(validation))
    if starts:
        note = "Held-out starts, not used in training, that score higher than before it."
        found.insert(1, Tile("Starts that improved", str(up), f"of {starts}", note=note))
    return found


def show_held_out(page: Page, run: Path, validation: Lines) -> None:
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
    page.figures(*_curves(validation), columns=2)


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


def _curves(validation: Lines) -> list[Figure]:
    steps = [number_of(line, "step") for line in validation]
    figures = []
    for name, value in validation[-1].items():
        if name in ("step", "starts") or not isinstance(value, int | float):
            continue
        label = "PSNR to truth, dB" if name == "psnr" else name.replace("_", " ")
        first, last = (line.get("starts", {}).get(name, []) for line in (validation[0], validation[-1]))
        if len(validation) == 2 and len(first) == len(last):
            plot = paired_plot(first, last, labels=(f"step {steps[0]:.0f}", f"step {steps[-1]:.0f}"), ylabel=label)
            caption = "One line a start. The short bars are the means; a dashed line is a start that got worse."
        else:
            values = [number_of(line, name) for line in validation]
            plot, caption = line_plot({label: values}, x=steps, xlabel="training step", ylabel=label), ""
        alt = f"{label} of the held-out starts"
        figures.append(Figure.svg(plot, alt=alt, title=label[:1].upper() + label[1:], caption=caption))
    return figures


def _leading_score(validation: Lines) -> str:
    """The measure by which starts are told to have improved."""
    names = ("face_score", *(name for name in validation[-1] if name not in ("step", "starts", "psnr")), "psnr")
    return next((name for name in names if name in validation[-1]), "face_score")


def _starts_up(validation: Lines, name: str) -> tuple[int, int]:
    """How many starts have a higher score at the last look than at the first, of how many."""
    first, last = (line.get("starts", {}).get(name, []) for line in (validation[0], validation[-1]))
    if len(validation) < 2 or len(first) != len(last):
        return 0, 0
    return sum(a is not None and b is not None and b > a for a, b in zip(first, last, strict=True)), len(last)
