"""The report of a run: what was gained on held-out starts, the curves, which engine ran what; one page, one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frostline.documents import parse_json, read_yaml
from frostline.errors import DataError, DocumentError
from frostline.report.formatting import duration, number_of, plain
from frostline.report.page import Figure, Page
from frostline.report.plots import line_plot
from frostline.train.flatten import flatten
from frostline.train.loop.run_dir import CONFIG, METRICS, REPORT, RUN_FACTS, TIMING, VALIDATION, read_lines
from frostline.train.report.held_out import outcome, show_held_out, tiles
from frostline.train.report.stages import show_stages, step_tile


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the trainer left in the folder; also while it is still at work.

    Raises:
        DataError: the folder holds no run.
    """
    metrics, validation = read_lines(run / METRICS), read_lines(run / VALIDATION)
    if not metrics and not validation:
        raise DataError(f"{run}: holds no run: there is no {METRICS}")
    facts, timing = _read_json(run / RUN_FACTS), _read_json(run / TIMING)
    page = Page(f"Training run {run.resolve().name}", _subtitle(metrics))
    page.paragraph(_steps(metrics) + outcome(validation), lead=True)
    page.tiles([*(tiles(validation) if validation else []), *step_tile(metrics, timing)])
    if validation:
        show_held_out(page, run, validation)
    page.heading("What the training did")
    page.figures(*_curves(metrics), columns=2)
    show_stages(page, metrics, facts, timing)
    page.heading("The run")
    page.facts({**_texts(facts.get("versions", {})), **_texts(flatten(_read_config(run / CONFIG)))})
    return page.write(run / REPORT)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The score, the KL, the detection rate where faces are rewarded, and the pace."""
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
    return [
        *figures,
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


def _subtitle(metrics: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(number_of(row, "seconds") for row in metrics)
    return " · ".join(("frostline train", f"{len(metrics)} steps", duration(seconds)))


def _steps(metrics: Sequence[Mapping[str, Any]]) -> str:
    skipped = sum(bool(row.get("skipped")) for row in metrics)
    if skipped:
        return f"{len(metrics)} steps, {skipped} of them skipped because the loss or its gradient was not finite."
    return f"{len(metrics)} steps."


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: plain(value) for name, value in values.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return _mapping(path, lambda: parse_json(path.read_bytes()))


def _read_config(path: Path) -> dict[str, Any]:
    return _mapping(path, lambda: read_yaml(path))


def _mapping(path: Path, read: Callable[[], Any]) -> dict[str, Any]:
    try:
        content = read() if path.is_file() else {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise DataError(f"{path}: {error}") from error
    return content if isinstance(content, dict) else {}
