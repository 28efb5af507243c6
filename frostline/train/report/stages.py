"""The part of a run's report about its stages: which backend ran what, how exactly, how fast, and against PyTorch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from frostline.report.formatting import TIMES, fixed, milliseconds, number_of, ratio, scientific
from frostline.report.page import Cell, Column, Figure, Page, Tile
from frostline.report.plots import bar_plot

_COLUMNS = (
    Column("Stage"),
    Column("Use"),
    Column("Backend"),
    Column("ms", "right"),
    Column("Parity", "right"),
    Column("Why"),
)
_CAPTION = (
    "Milliseconds are the median over the steps: 0 where most steps read cached outputs, none where no "
    "step needed the stage. Of a live stage the gradient is PyTorch's, whoever computes its outputs."
)


def show_stages(
    page: Page, metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], timing: Mapping[str, Any]
) -> None:
    """The table of stages, and where `frostline demo` has timed the step in turns with PyTorch, the comparison."""
    page.heading("Which backend ran what")
    page.paragraph(
        "A training step is a chain of stages. Frozen stages carry no gradient, so any engine may run them; live "
        "stages teach the model, and their gradient is PyTorch's. Before an engine is used, its output is held against "
        "PyTorch's on the same input: parity is the largest difference found in any number of that output."
    )
    page.table(_COLUMNS, _rows(metrics, facts), caption=_CAPTION)
    if timing:
        page.figures(*_comparison(timing), columns=2)


def step_tile(metrics: Sequence[Mapping[str, Any]], timing: Mapping[str, Any]) -> list[Tile]:
    """How long a step takes."""
    steps = timing.get("step_ms", {})
    torch_ms, cached_ms, uncached_ms = (number_of(steps, name) for name in ("torch", "cached", "uncached"))
    speed = ratio(torch_ms, cached_ms)
    if not math.isnan(speed):
        note = (
            "The same step with every stage in PyTorch, then with the frozen stages on the backends of the plan and "
            f"their outputs cached ({uncached_ms:.0f} ms uncached)."
        )
        trend = "better" if speed > 1 else "worse" if speed < 1 else "same"
        change = f"{speed:.2f} {TIMES} the speed"
        return [Tile("One training step", fixed(cached_ms, 0), "ms", fixed(torch_ms, 0), change, trend, note)]
    seconds = [number_of(row, "seconds") for row in metrics]
    return [Tile("One training step", fixed(statistics.median(seconds), 2), "s", note="The median.")] if seconds else []


def _rows(metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[list[str | Cell]]:
    """Frozen stages as planned, then what is live."""
    plan = facts.get("plan", {})
    times: dict[str, list[float]] = {}
    served: dict[str, str] = {}
    for row in metrics:
        for name, stage in row.get("stages", {}).items():
            times.setdefault(name, []).append(float(stage["ms"]))
            served[name] = stage["backend"]
    rows: list[list[str | Cell]] = []
    for name in [*plan, *(name for name in times if name not in plan)]:
        choice = plan.get(name, {"reason": "carries gradient"})
        # A stage whose outputs were all cached took no time in that step.
        taken = times[name] + [0.0] * (len(metrics) - len(times[name])) if name in times else []
        median, parity = statistics.median(taken) if taken else math.nan, number_of(choice, "parity_max_abs")
        rows.append(
            [
                name,
                "frozen" if name in plan else "live",
                choice.get("backend") or served[name],
                Cell(milliseconds(median), median),
                Cell(scientific(parity), parity),
                Cell(choice["reason"], muted=True),
            ]
        )
    return rows


def _comparison(timing: Mapping[str, Any]) -> list[Figure]:
    steps, stages = timing.get("step_ms", {}), timing.get("stage_ms", {})
    planned, in_torch = stages.get("uncached", {}), stages.get("torch", {})
    bars: dict[str, dict[str, float | None]] = {
        name: {"as planned": planned.get(name), "PyTorch alone": in_torch.get(name)} for name in in_torch
    }
    step: dict[str, dict[str, float | None]] = {
        label: {"step": steps.get(name)}
        for label, name in (
            ("as planned, cached", "cached"),
            ("as planned, uncached", "uncached"),
            ("PyTorch alone", "torch"),
        )
    }
    return [
        Figure.svg(
            bar_plot(bars, unit="ms"), "Milliseconds of each stage, as planned and in PyTorch", "Each stage, in turns"
        ),
        Figure.svg(
            bar_plot(step, unit="ms"),
            alt="Milliseconds of one training step, as planned and in PyTorch",
            title="One training step, in turns",
            caption="Cached: frozen outputs that do not change between epochs are read from the cache.",
        ),
    ]
