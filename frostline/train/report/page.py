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
from frostline.train.loop.run_dir import (
    CONFIG,
    METRICS,
    REPORT,
    RUN_FACTS,
    TIMING,
    VALIDATION,
    check_is_run,
    read_lines,
)
from frostline.train.report.held_out import outcome, show_held_out, tiles
from frostline.train.report.judged import show_judged, show_verdict
from frostline.train.report.measures import Measures, is_number, label
from frostline.train.report.stages import show_stages, step_tile

# What every line of metrics.jsonl has, whatever is rewarded.
_OF_THE_TRAINER = (
    *("step", "loss", "score", "kl_loss", "kl_weight", "sft_loss", "grad_norm", "learning_rate", "skipped", "seconds"),
)


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the trainer left in the folder; also while it is still at work.

    Raises:
        DataError: the folder holds no run.
    """
    check_is_run(run)
    metrics, validation = read_lines(run / METRICS), read_lines(run / VALIDATION)
    if not metrics and not validation:
        raise DataError(f"{run}: {METRICS} has no line of a step that was finished")
    facts, timing = _read_json(run / RUN_FACTS), _read_json(run / TIMING)
    page = Page(f"Training run {run.resolve().name}", _subtitle(metrics))
    measures = Measures.of(validation, facts)
    if validation:
        show_verdict(page, metrics, validation)
    page.paragraph(_steps(metrics) + outcome(validation, measures), lead=True)
    page.tiles([*(tiles(validation, measures) if validation else []), *step_tile(metrics, timing)])
    if validation:
        show_judged(page, metrics, validation, measures)
        show_held_out(page, run, validation, measures)
    page.heading("What the training did")
    page.figures(*_curves(metrics, measures), columns=2)
    show_stages(page, metrics, facts, timing)
    page.heading("The run")
    page.facts({**_texts(facts.get("versions", {})), **_texts(flatten(_read_config(run / CONFIG)))})
    return page.write(run / REPORT)


def _curves(metrics: Sequence[Mapping[str, Any]], measures: Measures) -> list[Figure]:
    """The rewards and what they measure beside, the KL, and the pace."""
    rewards = measures.rewards or ("score",)
    figures = [
        _curve(
            metrics,
            name,
            f"{label(name)} while training",
            "The score of the clips of each training step. It jumps about, as every step has other clips: some are "
            "harder than others.",
        )
        for name in rewards
    ]
    kl = (
        "KL measures how far the trained model's predictions have moved from the untrained model's. "
        "It is part of the loss, so that the reward is not bought with a broken model."
    )
    figures.append(_curve(metrics, "kl_loss", "Distance from the model it was", kl, ylabel="KL"))
    weights = [row["kl_weight"] for row in metrics if is_number(row.get("kl_weight"))]
    if len({*weights}) > 1:
        adapted = "Adapted after each step, so that the KL loss stays near kl_target."
        figures.append(_curve(metrics, "kl_weight", "Weight of the KL loss", adapted))
    if any(is_number(row.get("sft_loss")) for row in metrics):
        clips = "Flow-matching loss on the data's own clips, part of the loss by sft_weight."
        figures.append(_curve(metrics, "sft_loss", "Loss on the data's clips", clips))
    beside = dict.fromkeys(name for row in metrics for name, value in row.items() if is_number(value))
    for name in (name for name in beside if name not in (*_OF_THE_TRAINER, *rewards)):
        figures.append(_curve(metrics, name, label(name), "Measured beside the score in each training step."))
    return [
        *figures,
        _curve(metrics, "grad_norm", "The gradient", "Its norm before it was clipped.", ylabel="gradient norm"),
        _curve(metrics, "seconds", "Seconds per step", "Outputs that do not change are cached after their first step."),
    ]


def _curve(metrics: Sequence[Mapping[str, Any]], name: str, title: str, caption: str, ylabel: str = "") -> Figure:
    rows = [row for row in metrics if "step" in row]
    smooth, ylabel = max(1, len(rows) // 12), ylabel or name.replace("_", " ")
    average = f" The bold line is the average of {smooth} steps." if smooth > 1 else ""
    steps, series = [number_of(row, "step") for row in rows], {ylabel: [number_of(row, name) for row in rows]}
    plot = line_plot(series, x=steps, xlabel="training step", ylabel=ylabel, smooth=smooth)
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
