"""Make the part of a run's report that compares rewards with judges, which are not used in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frostline.report.formatting import number_of
from frostline.report.page import Figure, Page
from frostline.report.stacked import Row, stacked_plot
from frostline.train.judging.verdict import ERRORS, change_of, verdict
from frostline.train.report.measures import Lines, Measures, label

_CAPTION = (
    "In training: the score of the samples of each step, which differ from step to step. Change: the mean change of "
    "the validation samples since the first validation, over the frames that were scored both times, for rewards and "
    f"judges alike. The band is ±{ERRORS:g} standard errors: a change is significant where 0 is outside."
)
_ASKED = (
    "A judge scores the same clips, but is not used in training. If a judge falls while the reward rises, this "
    "indicates reward hacking."
)
_SMOOTH = 12


def show_verdict(page: Page, metrics: Lines, validation: Lines) -> None:
    """Add the verdict at the top of the page, and whether it ended the run."""
    said = verdict(validation)
    if not said.sentence:
        return
    sentence = said.sentence[:1].upper() + said.sentence[1:]
    last, trained = validation[-1], max((number_of(line, "step") for line in metrics), default=0)
    stored = last.get("verdict")
    if isinstance(stored, Mapping) and stored.get("stops") and trained <= number_of(last, "step"):
        sentence += (
            f" The run was ended at step {last['step']}, after {said.falling_in_row} validations in a row at which a "
            "judge fell (train.stop_when_judge_falls)."
        )
    page.paragraph(sentence, lead=True, trend="worse" if said.is_bad else "same")


def show_judged(page: Page, metrics: Sequence[Mapping[str, Any]], validation: Lines, measures: Measures) -> None:
    """Add plots of rewards, judges, KL divergence and ratios over the training steps to the page."""
    if len(validation) < 2:
        return
    rows = [_changes(validation, name, colour=0) for name in measures.rewards]
    rows += [_changes(validation, name, colour=1) for name in measures.judges]
    steps = [line for line in metrics if "step" in line]
    if steps:
        x, smooth = [number_of(line, "step") for line in steps], max(1, len(steps) // _SMOOTH)
        trained = {name: [number_of(line, name) for line in steps] for name in measures.rewards}
        rows = [
            *(Row(f"{label(name)} in training", x, y, smooth=smooth, colour=0) for name, y in trained.items()),
            *rows,
        ]
        kl = [number_of(line, "kl_loss") for line in steps]
        rows.append(Row("KL divergence from the base model", x, kl, smooth=smooth, rule=0.0, colour=3))
    x = [number_of(line, "step") for line in validation]
    for name in measures.ratios:
        values = [number_of(line, name) for line in validation]
        rows.append(Row(f"{label(name)} (1 is like the true clip)", x, values, rule=1.0, dots=True, colour=2))
    page.heading("Rewards and judges")
    page.paragraph(
        "Training only optimises the reward, and can raise it in unintended ways. "
        + (_ASKED if measures.judges else "This run has no judge: set one in validation.judges.")
    )
    shown = ", ".join(row.label for row in rows)
    page.figures(
        Figure.svg(stacked_plot(rows, "training step"), f"Over the training steps: {shown}", caption=_CAPTION),
        columns=2,
    )


def _changes(validation: Lines, name: str, colour: int) -> Row:
    """Return the paired change of a measure at each validation as a plot."""
    x, gain, low, high = [], [], [], []
    for end in range(1, len(validation) + 1):
        change = change_of(validation[:end], name)
        first = change is None and name in validation[end - 1].get("starts", {})
        value = 0.0 if first else float("nan") if change is None else change.gain.gain
        error = 0.0 if change is None else ERRORS * change.gain.error
        x.append(number_of(validation[end - 1], "step"))
        gain.append(value)
        low.append(value - error)
        high.append(value + error)
    return Row(f"{label(name)}: change", x, gain, low, high, rule=0.0, dots=True, colour=colour)
