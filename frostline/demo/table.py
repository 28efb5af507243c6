"""The last lines of the demo on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from frostline.terminal import Terminal
from frostline.train.loop.run_dir import REPORT, SHEET


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """A small table of what changed, how fast it ran, and where to look."""
    table = Table(title=f"{summary['starts']} held-out starts", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key, form in (
        ("face score", "face_score", ".3f"),
        ("detection rate", "detection_rate", ".3f"),
        ("PSNR to truth, dB", "psnr", ".2f"),
    ):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        table.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after - before:+{form}}")
    console = Terminal()
    console.print(table)
    console.print(f"face score up in {summary['starts_up']} of {summary['starts']} starts")
    console.print(
        f"one step: {summary['step_ms_warm']:.0f} ms as planned, {summary['step_ms_cold']:.0f} ms with "
        f"nothing recalled, {summary['step_ms_torch']:.0f} ms all torch"
    )
    console.print(f"{summary['seconds']:.0f} s in all. Look at {out / REPORT} and {out / SHEET}")
