"""Exports, engines and plans as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from frostline.escaping import printable_name
from frostline.export.result import ExportRow
from frostline.runtime.backends import TORCH
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.store import EngineRecord
from frostline.terminal.tables import Column, FittedTable

if TYPE_CHECKING:
    from frostline.export.plan_estimate import StageGain, StepGain

_STYLES = {"built": "green", "present": "dim", "planned": "cyan", "failed": "bold red"}


def export_table(rows: Iterable[ExportRow]) -> FittedTable:
    """Return a table of an export, with parity and latency of each engine."""
    table = FittedTable(
        Column("stage"),
        Column("backend"),
        Column("status"),
        Column("seconds", right=True, drop=1),
        Column("max abs error", right=True, drop=2),
        Column("cosine", right=True, drop=4),
        Column("ms", right=True),
        Column("torch ms", right=True, drop=3),
    )
    for row in rows:
        status = Text(row.status, _STYLES[row.status])
        table.add_row(row.stage, row.backend, status, f"{row.seconds:.1f}", *_measured(row.manifest))
    return table


def export_notes(rows: Iterable[ExportRow]) -> list[str]:
    """Return the notes of an export, such as why a stage failed: each note once, with its stages."""
    stages: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            stages.setdefault((row.backend, row.note), []).append(row.stage)
    return [f"{backend} {', '.join(names)}: {note}" for (backend, note), names in stages.items()]


def engine_table(records: Iterable[EngineRecord]) -> FittedTable:
    """Return a table of the engines of a store. The key, which other commands take, is always shown."""
    table = FittedTable(
        Column("model", drop=2),
        Column("stage"),
        Column("backend", drop=1),
        Column("key"),
        Column("device", drop=7),
        Column("precision", drop=6),
        Column("MB", right=True, drop=4),
        Column("max abs error", right=True, drop=8),
        Column("created", drop=5),
        Column("parity", wraps=True, drop=3),
    )
    for record in records:
        manifest = record.manifest
        if manifest is None:
            row = ["", "", f"{record.bytes / 1e6:.1f}", "", "", Text(printable_name(f"{record.problem}"), "red")]
        else:
            parity = "verified" if manifest.verified else "not verified here"
            created = f"{manifest.created:%Y-%m-%d %H:%M}"
            worst = _measured(manifest)[0]
            row = [manifest.device, manifest.precision, f"{record.bytes / 1e6:.1f}", worst, created, parity]
        table.add_row(record.id.model, record.id.stage, record.id.backend, record.id.key, *row)
    return table


def plan_table(gains: Iterable[StageGain]) -> FittedTable:
    """Return a table of stages: the available engines, the chosen backend and the reason."""
    table = FittedTable(
        Column("stage"),
        Column("candidate"),
        Column("ms", right=True),
        Column("torch ms", right=True, drop=1),
        Column("max abs error", right=True, drop=3),
        Column("MB", right=True, drop=2),
        Column("why", wraps=True),
    )
    for gain in gains:
        name = gain.stage
        for candidate in gain.candidates:
            chosen = candidate.backend == gain.choice.backend
            if not chosen and not candidate.bytes:
                continue
            mark = Text(f"> {candidate.backend}", "bold green") if chosen else Text(f"  {candidate.backend}")
            size = f"{candidate.bytes / 1e6:.1f}" if candidate.bytes else ""
            cells = (_number(candidate.ms), _number(candidate.torch_ms), _scientific(candidate.max_abs), size)
            why = printable_name(gain.choice.reason if chosen else candidate.note)
            table.add_row(name, mark, *cells, Text(why, "" if chosen else "dim"))
            name = ""
    return table


def step_gain_lines(gain: StepGain) -> list[str]:
    """Return the predicted gain of one training step as sentences."""
    if not gain.torch_ms:
        return ["no engine was measured on this machine, so the step time cannot be predicted"]
    left_out = (
        f"; not included, because not timed on this machine: {', '.join(gain.unmeasured)}" if gain.unmeasured else ""
    )
    whole_torch, whole_planned = gain.torch_ms + gain.live_ms, gain.planned_ms + gain.live_ms
    return [
        f"frozen part of one step, uncached: {TORCH} {gain.torch_ms:.0f} ms, planned "
        f"{gain.planned_ms:.0f} ms ({gain.torch_ms / gain.planned_ms:.2f}x){left_out}",
        f"whole step, including a live part of about {gain.live_ms:.0f} ms (no checkpointing, "
        f"backward as long as forward): {TORCH} {whole_torch:.0f} ms, planned "
        f"{whole_planned:.0f} ms ({whole_torch / whole_planned:.2f}x)",
    ]


def _measured(manifest: Manifest | None) -> tuple[str, str, str, str]:
    """Return the largest error, the lowest cosine similarity, and the latencies of engine and torch."""
    if manifest is None or not manifest.parity:
        return "", "", "", ""
    worst = max(parity.max_abs for parity in manifest.parity)
    cosine = min(parity.cosine for parity in manifest.parity)
    latency = manifest.latency_ms
    return _scientific(worst), f"{cosine:.7f}", _number(latency.get(manifest.backend)), _number(latency.get(TORCH))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
