"""Write the report of a run as one HTML page: changes in validation, training curves, and backends of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from frostline.documents import parse_json, read_yaml
from frostline.errors import DataError, DocumentError
from frostline.report.formatting import duration, number_of
from frostline.report.page import Page
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
from frostline.train.report.curves import Metrics, curves
from frostline.train.report.held_out import outcome, show_held_out, tiles
from frostline.train.report.judged import show_judged, show_verdict
from frostline.train.report.measures import Measures
from frostline.train.report.run_section import sessions_of, show_run, wall_clock
from frostline.train.report.stages import show_stages, step_tile


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the files in a run folder. The run can still be active.

    Returns:
        The path of the report.
    Raises:
        DataError: the folder is not a run folder, the run has no steps yet, or a file cannot be read.
    """
    check_is_run(run)
    metrics, validation = read_lines(run / METRICS), read_lines(run / VALIDATION)
    if not metrics and not validation:
        raise DataError(f"{run}: {METRICS} contains no finished step")
    facts, timing = _read_json(run / RUN_FACTS), _read_json(run / TIMING)
    config = _read_config(run / CONFIG)
    page = Page(f"Training run {run.resolve().name}", _subtitle(metrics, facts))
    measures = Measures.of(validation, facts)
    if validation:
        show_verdict(page, metrics, validation)
    page.paragraph(_steps(metrics) + outcome(validation, measures), lead=True)
    page.tiles([*(tiles(validation, measures) if validation else []), *step_tile(metrics, facts, timing)])
    if validation:
        show_judged(page, metrics, validation, measures)
        show_held_out(page, run, validation, measures)
    page.heading("Training curves")
    page.figures(*curves(metrics, measures, config, facts), columns=2)
    show_stages(page, metrics, facts, timing)
    show_run(page, run, metrics, facts, config)
    return page.write(run / REPORT)


def _subtitle(metrics: Metrics, facts: Mapping[str, Any]) -> str:
    seconds = wall_clock(facts) or sum(number_of(row, "seconds") for row in metrics)
    began = [str(session["began"])[:10] for session in sessions_of(facts)[:1]]
    return " · ".join(("frostline train", *began, f"{len(metrics)} steps", duration(seconds)))


def _steps(metrics: Metrics) -> str:
    skipped = sum(bool(row.get("skipped")) for row in metrics)
    if skipped:
        return f"{len(metrics)} steps, {skipped} of them skipped because the loss or its gradient was not finite."
    return f"{len(metrics)} steps."


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
