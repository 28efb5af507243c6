"""A memory plan as a table for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from frostline.terminal.tables import Column, FittedTable
from frostline.train.memory.plan import MemoryPlan

_GB = 1e9


def memory_table(plan: MemoryPlan) -> Group:
    """Stage by stage what one device holds, the adapter, the peak of each phase, and the verdict."""
    sizes = ("weights", "engine", "frozen peak", "kept for backward", "live peak")
    table = FittedTable(Column("GB per device"), *(Column(size, right=True) for size in sizes))
    for stage in plan.stages:
        sizes = (stage.weights, stage.engine, stage.frozen_peak, stage.kept, stage.live_peak)
        table.add_row(stage.stage, *map(_cell, sizes))
    training = f"LoRA {_cell(plan.adapter)}, its gradients {_cell(plan.gradients)}, AdamW {_cell(plan.optimizer)}"
    peaks = ", ".join(f"{phase} {_cell(size)}" for phase, size in plan.peaks.items())
    processes = f"{plan.num_processes} processes ({plan.sharding})" if plan.num_processes > 1 else "1 process"
    alone = ", ".join(f"{stage} {_cell(size)}" for stage, size in plan.precompute.items())
    before = [f"precompute, before the first step, one stage at a time: {alone}"] if alone else []
    lines = [
        *before,
        f"{training}; held all the time {_cell(plan.resident)}",
        f"most activations at once: {peaks}",
        f"gradient checkpointing: {plan.gradient_checkpointing}",
        f"{processes}: peak {_cell(plan.peak)} GB of each device{_verdict(plan)}",
    ]
    if plan.assumed:
        lines.append(f"there are no files: the sizes are those of the release {plan.model}")
    return Group(table, *map(Text, lines))


def _verdict(plan: MemoryPlan) -> str:
    if plan.device_bytes is None:
        return ""
    word = "fits" if plan.fits else "does not fit"
    return f", which has {_cell(plan.device_bytes)}: {word}"


def _cell(size: int) -> str:
    return f"{size / _GB:.2f}" if size else "-"
