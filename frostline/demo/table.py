"""Print the summary of the demo on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostline.terminal import Terminal
from frostline.terminal.tables import Column, FittedTable
from frostline.train.loop.run_dir import REPORT, SHEET


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print a table of changes, the step time, and the paths of report and contact sheet."""
    numbers = (Column(title, right=True) for title in ("before", "after", "change"))
    table = FittedTable(Column(""), *numbers, title=f"{summary['starts']} validation samples")
    rows = [("face score", "face_score", ".3f"), ("detection rate", "detection_rate", ".3f")]
    # Judges, which are not used in training.
    rows += [(name.replace("_", " "), name, ".3f") for name in summary["paired"] if name != "face_score"]
    for name, key, form in (*rows, ("PSNR to ground truth, dB", "psnr", ".2f")):
        if summary[f"{key}_before"] is None or summary[f"{key}_after"] is None:
            continue
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        table.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after - before:+{form}}")
    console = Terminal()
    console.print(table)
    for name, change in summary["paired"].items():
        if not change["starts"]:
            continue
        console.print(_change(name, change), soft_wrap=True)
    console.print(summary["verdict"], soft_wrap=True)
    console.print(
        f"one step: {summary['step_ms_cached']:.0f} ms cached, {summary['step_ms_uncached']:.0f} ms uncached, "
        f"{summary['step_ms_torch']:.0f} ms in PyTorch"
    )
    console.print(f"{summary['seconds']:.0f} s in total. Results: {out / REPORT} and {out / SHEET}")


def _change(name: str, change: Mapping[str, Any]) -> str:
    """Return the change of a score as text: in frames scored both before and after, and in all, with 0 for no score."""
    up = f"{name.replace('_', ' ')} up in {change['starts_up']} of {change['starts']} samples, by {change['gain']:+.3f}"
    if change.get("gain_missing_zero") is None:
        return up
    # Scores with 0 for missing faces show whether the gain comes from hidden faces.
    zero = f"{change['gain_missing_zero']:+.3f} in all frames, with 0 for frames without a score"
    return f"{up} in the {change['frames']} frames that were scored both times, {zero}"
