"""Make the part of a run's report about its stages: backends, calls, parity and latency."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frostline.report.formatting import NONE, TIMES, fixed, milliseconds, number_of, ratio, scientific
from frostline.report.page import Cell, Column, Figure, Page, Tile
from frostline.report.plots import bar_plot
from frostline.report.timeline import Span, timeline_plot
from frostline.runtime.backends import TORCH
from frostline.train.report.curves import Metrics, median_seconds, settled
from frostline.train.report.run_section import sessions_of

_COLUMNS = (
    Column("Stage"),
    Column("Use"),
    Column("Backend"),
    Column("Steps", "right"),
    Column("Calls", "right"),
    Column("In validations", "right"),
    Column("ms", "right"),
    Column("Parity", "right"),
    Column("Why"),
)
_CAPTION = (
    "Steps: the number of training steps in which the backend computed the stage; in the others, its outputs came from "
    "the cache, another backend computed it, or it was not needed. Calls: the total in all training steps. In "
    "validations: the calls in all validations, except those of judges. "
    "ms: the median of the steps in which it ran. PyTorch always computes the gradient of live stages, whichever "
    "backend computes their outputs."
)
_ENGINE, _PYTORCH = "engine", "PyTorch"
_KINDS = {_ENGINE: 0, _PYTORCH: 1}
_LIVE, _TAIL, _DENOISER = "_live", "denoise_tail", "denoiser"


@dataclass
class _Served:
    """The work of one backend for one use of a stage.

    Attributes:
        ms: milliseconds of each step in which it ran.
        calls: the number of calls in training steps; None if not recorded.
        validation_calls: the number of calls in validations; None if not recorded.
    """

    ms: list[float] = field(default_factory=list)
    calls: int | None = 0
    validation_calls: int | None = None


def show_stages(page: Page, metrics: Metrics, facts: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """Add the table of stages, the timeline of a step and, in `frostline demo`, the comparison with PyTorch."""
    page.heading("Backends of the stages")
    page.paragraph(
        "A training step is a sequence of stages. Frozen stages need no gradient and can run on any engine; live "
        "stages need gradients, which PyTorch computes. Before an engine is used, its outputs are compared with those "
        "of PyTorch on the same inputs: parity is the largest absolute difference of any output value."
    )
    page.table(_COLUMNS, _rows(metrics, facts), caption=_CAPTION)
    figures = [*_timeline(metrics, facts), *(_comparison(timing) if timing else [])]
    if figures:
        page.figures(*figures, columns=2)


def step_tile(metrics: Metrics, facts: Mapping[str, Any], timing: Mapping[str, Any]) -> list[Tile]:
    """Return a tile with the duration of a step; an empty list without steps."""
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
    seconds = median_seconds(metrics, facts)
    return [] if seconds is None else [Tile("One training step", fixed(seconds, 2), "s", note="The median.")]


def _rows(metrics: Metrics, facts: Mapping[str, Any]) -> list[list[str | Cell]]:
    """Return one row for each stage and backend: frozen stages, then live stages, then stages that did not run."""
    plan, served = facts.get("plan", {}), _served(metrics, facts)
    uses = [*(name for name in plan if name in served), *(name for name in served if name not in plan)]
    rows: list[list[str | Cell]] = []
    for use in uses:
        for backend, done in served[use].items():
            parity = _parity(plan, use, backend)
            median = statistics.median(done.ms) if done.ms else math.nan
            rows.append(
                [
                    use,
                    "frozen" if use in plan else "live",
                    backend,
                    Cell(f"{len(done.ms)} of {len(metrics)}", len(done.ms)),
                    _count(done.calls),
                    _count(done.validation_calls),
                    Cell(milliseconds(median), median),
                    Cell(scientific(parity), parity),
                    Cell(_reason(plan, use, backend), muted=True),
                ]
            )
    never = [name for name in plan if name not in served]
    empty = [Cell(NONE), Cell(NONE), Cell(NONE), Cell(NONE)]
    said = Cell("not called: its outputs came from the cache, or were not needed", muted=True)
    return rows + [[name, "frozen", NONE, Cell(f"0 of {len(metrics)}", 0), *empty, said] for name in never]


def _served(metrics: Metrics, facts: Mapping[str, Any]) -> dict[str, dict[str, _Served]]:
    """Return the recorded work for each use of a stage, by backend."""
    served: dict[str, dict[str, _Served]] = defaultdict(lambda: defaultdict(_Served))
    for row in metrics:
        for use, stage in row.get("stages", {}).items():
            for backend, calls, ms in _backends(stage):
                done = served[use][backend]
                done.ms.append(ms)
                done.calls = None if calls is None or done.calls is None else done.calls + calls
    sessions = sessions_of(facts)
    for session in sessions:
        for use, calls in session.get("validation_calls", {}).items():
            for backend, number in calls.items():
                done = served[use][backend]
                done.validation_calls = (done.validation_calls or 0) + int(number)
    for done in (done for backends in served.values() for done in backends.values()):
        if sessions and done.validation_calls is None:
            done.validation_calls = 0
    return served


def _backends(stage: Mapping[str, Any]) -> list[tuple[str, int | None, float]]:
    """Return backend, calls and milliseconds. Older runs have no calls, and one time for all backends."""
    backends = stage.get("backends")
    if not isinstance(backends, Mapping):
        return [(backend, None, float(stage["ms"])) for backend in [stage["backend"]]]
    return [(backend, int(each["calls"]), float(each["ms"])) for backend, each in backends.items()]


def _parity(plan: Mapping[str, Any], use: str, backend: str) -> float:
    """Return the parity of the backend's engine for a stage; for the denoise tail, the largest of all denoisers."""
    stage = use.removesuffix(_LIVE)
    stages = [name for name in plan if name.startswith(_DENOISER)] if use == _TAIL else [stage] if stage in plan else []
    found = [number_of(plan[name].get("parity", {}), backend) for name in stages]
    return max((parity for parity in found if not math.isnan(parity)), default=math.nan)


def _reason(plan: Mapping[str, Any], use: str, backend: str) -> str:
    if use not in plan:
        return "PyTorch computes the gradient"
    choice = plan[use]
    reasons = choice.get("reasons") or {choice.get("backend"): choice.get("reason", "")}
    return str(reasons.get(backend, ""))


def _count(number: int | None) -> Cell:
    return Cell(NONE) if number is None else Cell(str(number), number)


def _timeline(metrics: Metrics, facts: Mapping[str, Any]) -> list[Figure]:
    """Return the timeline of the step with the median duration."""
    steps = [row for row in settled(metrics, facts) if row.get("stages")]
    if not steps:
        return []
    row = sorted(steps, key=lambda each: number_of(each, "seconds"))[(len(steps) - 1) // 2]
    spans, begin = [], 0.0
    for use, stage in row["stages"].items():
        total = sum(ms for *_, ms in _backends(stage))
        for backend, _, ms in _backends(stage):
            kind = _PYTORCH if backend == TORCH else _ENGINE
            spans.append(Span(use, begin, ms, kind, f"{use} {milliseconds(total)} ms"))
            begin += ms
    rest = 1000 * number_of(row, "seconds") - begin
    if rest > 0:
        spans.append(Span("rest", begin, rest, None, f"the rest {milliseconds(rest)} ms"))
    caption = (
        f"Step {number_of(row, 'step'):.0f}, {fixed(number_of(row, 'seconds'), 2)} s, the median. All calls of a stage "
        "on one backend are drawn as one bar, in the order in which the stages first finished. The rest: data loading, "
        "the optimizer, and computation outside of stages."
    )
    plot = timeline_plot(spans, _KINDS, xlabel="milliseconds")
    said = ", ".join(span.text for span in spans)
    return [Figure.svg(plot, f"Stages of one training step: {said}", "The stages of one training step", caption)]


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
            bar_plot(step, unit="ms"),
            alt="Milliseconds of one training step, as planned and in PyTorch",
            title="Latency of one training step",
            caption="Cached: frozen outputs that do not change between epochs are read from the cache.",
        ),
        Figure.svg(
            bar_plot(bars, unit="ms"), "Milliseconds of each stage, as planned and in PyTorch", "Latency per stage"
        ),
    ]
