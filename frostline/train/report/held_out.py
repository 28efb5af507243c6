"""Make the part of a run's report about its validation samples: changes of the measures, clips and curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from frostline.report.formatting import Trend, fixed, number_of
from frostline.report.page import Figure, Page, Tile
from frostline.report.plots import line_plot, paired_plot
from frostline.report.tiles import change_tile
from frostline.train.judging.verdict import Change, change_of, signed
from frostline.train.report.measures import Lines, Measures, label
from frostline.train.report.samples import show_samples

_TRENDS: Mapping[str, Trend] = {"rises": "better", "falls": "worse"}


def outcome(validation: Lines, measures: Measures) -> str:
    """Return the result on the validation samples as a sentence; an empty string before the second validation."""
    if len(validation) < 2 or not measures.rewards:
        return ""
    name = measures.rewards[0]
    first, last = number_of(validation[0], name), number_of(validation[-1], name)
    words = f" {label(name)} of the validation samples: {fixed(first, 3)} at step {validation[0]['step']}, "
    words += f"{fixed(last, 3)} now"
    change = change_of(validation, name)
    if change is None or not change.gain.starts:
        return f"{words}."
    return f"{words}; it went up in {change.gain.starts_up} of {change.gain.starts}."


def tiles(validation: Lines, measures: Measures) -> list[Tile]:
    """Return a tile with the change of each measure since the first validation; metrics of judges are left out."""
    found = []
    for name in (*measures.rewards, *measures.judges, *measures.of_rewards):
        change = change_of(validation, name)
        found.append(_tile(validation, name, change, measures))
        if name == next(iter(measures.rewards), "") and change is not None and change.gain.starts:
            up, note = change.gain.starts_up, "Validation samples, not used in training, whose score has increased."
            found.append(Tile("Samples that improved", str(up), f"of {change.gain.starts}", note=note))
    return found


def _tile(validation: Lines, name: str, change: Change | None, measures: Measures) -> Tile:
    """Return a tile with the means of the first and last validation. Only rewards and judges have a trend."""
    before, after = number_of(validation[0], name), number_of(validation[-1], name)
    digits = 2 if max(abs(before), abs(after)) >= 10 else 3
    trend: Trend = "same"
    note = measures.about.get(name, "")
    if name in measures.judges:
        note = f"Not used in training. {note}".strip()
    if change is not None and name in (*measures.rewards, *measures.judges):
        trend = _TRENDS.get(change.direction, "same")
    if change is not None and change.gain_missing_zero is not None and change.gain.starts:
        zero = signed(change.gain_missing_zero.gain)
        note += f" Change in the {change.gain.frames} frames that were scored both times: {signed(change.gain.gain)}; "
        note += f"in all frames, with 0 for frames without a score: {zero}."
    if len(validation) < 2:
        return Tile(label(name), fixed(after, digits), note=note)
    return change_tile(label(name), before, after, digits, note.strip(), trend=trend)


def show_held_out(page: Page, run: Path, validation: Lines, measures: Measures) -> None:
    """Add the samples, and the changes of all measures, to the page."""
    page.heading("Validation samples")
    page.paragraph(
        "Each clip is generated from the prompt and, with an image-to-video model, the first frame of a sample that "
        "was not used in training, with the same noise in all validations. The sample with the worst change comes "
        "first, then the one with the best, and so on. The numbers are frame numbers and the scores of the frames."
    )
    show_samples(page, run, validation, measures)
    page.figures(*_curves(validation, measures), columns=2)


def _curves(validation: Lines, measures: Measures) -> list[Figure]:
    steps = [number_of(line, "step") for line in validation]
    figures = []
    for name in (*measures.rewards, *measures.judges, *measures.of_rewards):
        title = label(name)
        first, last = (line.get("starts", {}).get(name, []) for line in (validation[0], validation[-1]))
        if len(validation) == 2 and len(first) == len(last):
            plot = paired_plot(first, last, labels=(f"step {steps[0]:.0f}", f"step {steps[-1]:.0f}"), ylabel=title)
            caption = (
                "Each line is the value of one sample. The short bars are the means; a dashed line is a sample whose "
                "value fell."
            )
        else:
            values = [number_of(line, name) for line in validation]
            plot, caption = line_plot({title: values}, x=steps, xlabel="training step", ylabel=title), ""
        figures.append(Figure.svg(plot, alt=f"{title} of the validation samples", title=title, caption=caption))
    return figures
