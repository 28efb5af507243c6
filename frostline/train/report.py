"""The report of a run: what was gained on held-out starts, the curves, which engine ran what; one page, one file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from frostline.errors import DataError
from frostline.report.page import Cell, Column, Figure, Page, Tile
from frostline.report.plots import line_plot, paired_plot
from frostline.report.words import NONE, change_tile, duration, fixed, milliseconds, number_of, plain
from frostline.train.runfolder import METRICS, REPORT, RUN_FACTS, VALIDATION, read_lines
from frostline.train.saving import CONFIG
from frostline.train.validation import FOLDER

_SHOWN_CLIPS = 4
_SCORES = {
    "face_score": (
        "Face score",
        3,
        "",
        "How alike the faces in the generated frames and in the true clip are, as a cosine.",
    ),
    "detection_rate": (
        "Detection rate",
        3,
        "",
        "Share of the generated frames in which a face is found; must not fall.",
    ),
    "psnr": ("PSNR to truth", 2, "dB", "How near the pixels are to those of the true clip; higher is nearer."),
}


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the trainer left in the folder; also while it is still at work.

    Raises:
        DataError: the folder holds no run.
    """
    metrics, validation = read_lines(run / METRICS), read_lines(run / VALIDATION)
    if not metrics and not validation:
        raise DataError(f"{run}: holds no run: there is no {METRICS}")
    facts = _read_json(run / RUN_FACTS)
    page = Page(f"Training run {run.resolve().name}", _subtitle(metrics))
    page.paragraph(_outcome(metrics, validation), lead=True)
    page.tiles(_tiles(metrics, validation))
    if validation:
        page.heading("Held-out starts")
        page.paragraph("Generated from first frames that the training never saw, with the same noise every time.")
        page.figures(*_held_out_curves(validation), columns=2)
        _show_clips(page, run, validation[-1])
    page.heading("What the training did")
    page.figures(*training_curves(metrics), *_pace(metrics), columns=2)
    page.heading("Which backend ran what")
    page.table(_STAGE_COLUMNS, _stage_rows(metrics, facts), caption="Milliseconds are the median over the steps.")
    page.heading("The run")
    page.facts({**_texts(facts.get("versions", {})), **_texts(_flat(_read_config(run / CONFIG)))})
    return page.write(run / REPORT)


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The score, the KL, and (where faces are rewarded) the detection rate over the steps."""
    name = "face score" if any("face_score" in row for row in metrics) else "score"
    figures = [
        _curve(
            metrics,
            name.replace(" ", "_"),
            name,
            "The reward while training",
            f"The {name} of the clips of each training step. It jumps about, as every step has other clips: "
            "some are harder than others.",
        ),
        _curve(
            metrics,
            "kl_loss",
            "KL",
            "Distance from the model it was",
            "KL measures how far the trained model's predictions have moved from the untrained model's. "
            "It is part of the loss, so that the reward is not bought with a broken model.",
        ),
    ]
    if any("detection_rate" in row for row in metrics):
        figures.append(
            _curve(
                metrics,
                "detection_rate",
                "frames with a face",
                "Frames that show a face",
                "Detection rate in each training step. It has to stay up while the score rises.",
                percent=True,
                y_range=(0.0, 1.0),
            )
        )
    return figures


def _pace(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        _curve(metrics, "grad_norm", "gradient norm", "The gradient", "Its norm before it was clipped."),
        _curve(metrics, "seconds", "seconds", "Seconds per step", "What was computed once is recalled later."),
    ]


def _curve(
    metrics: Sequence[Mapping[str, Any]], name: str, ylabel: str, title: str, caption: str, **options: Any
) -> Figure:
    rows = [row for row in metrics if "step" in row]
    smooth = max(1, len(rows) // 12)
    average = f" The bold line is the average of {smooth} steps." if smooth > 1 else ""
    steps, series = [number_of(row, "step") for row in rows], {ylabel: [number_of(row, name) for row in rows]}
    plot = line_plot(series, x=steps, xlabel="training step", ylabel=ylabel, smooth=smooth, **options)
    return Figure.svg(plot, alt=f"{ylabel} over the training steps", title=title, caption=caption + average)


def _held_out_curves(validation: Sequence[Mapping[str, Any]]) -> list[Figure]:
    steps = [number_of(line, "step") for line in validation]
    figures = []
    for name, values in validation[-1].items():
        if name in ("step", "starts") or not isinstance(values, int | float):
            continue
        label = name.replace("_", " ")
        first, last = (line.get("starts", {}).get(name, []) for line in (validation[0], validation[-1]))
        if len(validation) == 2 and len(first) == len(last):
            plot = paired_plot(first, last, labels=(f"step {steps[0]:.0f}", f"step {steps[-1]:.0f}"), ylabel=label)
        else:
            plot = line_plot(
                {label: [number_of(line, name) for line in validation]}, x=steps, xlabel="training step", ylabel=label
            )
        figures.append(Figure.svg(plot, alt=f"{label} of the held-out starts", title=label.capitalize()))
    return figures


def _show_clips(page: Page, run: Path, line: Mapping[str, Any]) -> None:
    folder = run / FOLDER / f"step-{line['step']:06d}"
    sheet = folder / "contact_sheet.png"
    if sheet.is_file():
        page.figures(Figure.image(sheet, "Frames of held-out clips, the true one above the generated one", wide=True))
    clips = sorted(folder.glob("*.mp4"), key=lambda clip: int(clip.stem))[:_SHOWN_CLIPS]
    if clips:
        names = [f"Start {clip.stem}: the true clip, and the generated one beside it" for clip in clips]
        page.figures(*(Figure.video(clip, name, name) for clip, name in zip(clips, names, strict=True)), columns=2)


def _subtitle(metrics: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(number_of(row, "seconds") for row in metrics)
    return " · ".join(("frostline train", f"{len(metrics)} steps", duration(seconds)))


def _outcome(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> str:
    skipped = sum(bool(row.get("skipped")) for row in metrics)
    words = f"{len(metrics)} steps"
    if skipped:
        words += f", {skipped} of them skipped because the loss or its gradient was not finite"
    if len(validation) < 2:
        return f"{words}."
    name = "face_score" if "face_score" in validation[-1] else "score" if "score" in validation[-1] else "psnr"
    first, last = number_of(validation[0], name), number_of(validation[-1], name)
    label = _SCORES[name][0] if name in _SCORES else name
    return f"{words}. {label} of the held-out starts: {first:.3f} at step {validation[0]['step']}, {last:.3f} now."


def _tiles(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> list[Tile]:
    tiles = []
    if validation:
        for name, (label, digits, unit, note) in _SCORES.items():
            if name in validation[-1]:
                first, last = number_of(validation[0], name), number_of(validation[-1], name)
                tiles.append(change_tile(label, first, last, digits, note, unit, tolerance=0.3 if unit else 0.0))
    seconds = [number_of(row, "seconds") for row in metrics]
    if seconds:
        tiles.append(Tile("One training step", fixed(statistics.median(seconds), 2), "s", note="The median."))
    return tiles


_STAGE_COLUMNS = (Column("Stage"), Column("Use"), Column("Backend"), Column("ms", "right"), Column("Why"))


def _stage_rows(metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[list[str | Cell]]:
    """Frozen stages as planned, then what is live."""
    plan = facts.get("plan", {})
    times: dict[str, list[float]] = {}
    for row in metrics:
        for name, stage in row.get("stages", {}).items():
            times.setdefault(name, []).append(float(stage["ms"]))
    rows: list[list[str | Cell]] = []
    for name in [*plan, *(name for name in times if name not in plan)]:
        choice = plan.get(name)
        # A stage whose outputs were all recalled took no time in that step.
        taken = times.get(name, []) + [0.0] * (len(metrics) - len(times.get(name, [])))
        median = statistics.median(taken) if taken else float("nan")
        use = "frozen" if choice else "live"
        backend, reason = (choice["backend"], choice["reason"]) if choice else ("torch", "carries gradient")
        rows.append([name, use, backend, Cell(milliseconds(median), median), Cell(reason, muted=True)])
    return rows


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: plain(value, none=NONE) for name, value in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
