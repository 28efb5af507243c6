"""Print a memory plan, and the measures that reduce it, as tables on the terminal."""

from __future__ import annotations

import json

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from frostline.terminal.tables import Column, FittedTable
from frostline.train.memory.measures import Changes
from frostline.train.memory.plan import MemoryPlan
from frostline.train.memory.search import Remedy

_GB = 1e9


def memory_table(plan: MemoryPlan) -> Group:
    """Return a table of the memory per device: each stage, the adapter, the peak of each phase, and whether it fits."""
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
        f"{training}; resident in total {_cell(plan.resident)}",
        f"peak of the activations: {peaks}",
        f"gradient checkpointing: {plan.gradient_checkpointing}",
        f"{processes}: peak {_cell(plan.peak)} GB per device{_verdict(plan)}",
    ]
    if plan.offloaded_activations:
        activations = _cell(plan.offloaded_activations)
        lines.append(f"not in this peak: activations that are stored for backward in main memory: {activations} GB")
    if plan.offloaded_blocks:
        blocks = f"{plan.offloaded_blocks} blocks of each denoiser"
        lines.append(f"{blocks} are offloaded to main memory: {_cell(plan.main_memory)} GB")
    if plan.assumed:
        lines.append(f"the model has no files here: the sizes are those of the release {plan.model}")
    return Group(table, *map(Text, lines))


def remedy_table(remedy: Remedy) -> Table:
    """Return a table of the memory per device with each measure alone, and together with the measures above it."""
    table = Table(
        title="settings that need less memory, the cheapest first",
        box=None,
        pad_edge=False,
        header_style="bold",
        title_justify="left",
    )
    for column in ("setting", "alone, GB", "cumulative, GB", "effect", "costs"):
        table.add_column(column, justify="right" if column.endswith("GB") else "left", overflow="fold")
    for step in remedy.steps:
        given = " ".join(map(escape, overrides_of(step.changes)))
        table.add_row(given, _cell(step.alone), _cell(step.together), step.measure.about, step.measure.costs)
    return table


def overrides_of(changes: Changes) -> list[str]:
    """Return changes of settings in the syntax of the command line."""
    return [f"{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in changes.items()]


def outcome_of(remedy: Remedy) -> str:
    """Return a clause that lists the measures and states whether they are sufficient."""
    given = " ".join(value for step in remedy.steps for value in overrides_of(step.changes))
    if remedy.fits:
        return f"it fits with {given}: {_cell(remedy.steps[-1].together)} GB"
    less = f"{given} is not sufficient" if given else "no setting makes it fit"
    return f"{less}: {_cell(remedy.floor)} GB are needed for videos of any size"


def _verdict(plan: MemoryPlan) -> str:
    if plan.device_bytes is None:
        return ""
    word = "fits" if plan.fits else "does not fit"
    return f", which has {_cell(plan.device_bytes)}: {word}"


def _cell(size: int) -> str:
    return f"{size / _GB:.2f}" if size else "-"
