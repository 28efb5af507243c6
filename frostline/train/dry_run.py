"""`frostline train --dry-run`: what would run, and what is wrong with it, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frostline.errors import FrostlineError
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.video_shape import Geometry
from frostline.rewards.config import RewardConfig
from frostline.runtime.backends import TORCH
from frostline.runtime.device import resolve_device, total_bytes
from frostline.stages.families import family_of
from frostline.train.data.dataset import VideoPromptDataset
from frostline.train.memory.advice import memory_problem
from frostline.train.memory.plan import MemoryPlan, memory_plan
from frostline.train.memory.table import memory_table
from frostline.train.settings import RunSettings, VideoSettings
from frostline.train.validate_settings import check_output, problems


def print_dry_run(settings: RunSettings, console: Console, resume: str | None = None) -> bool:
    """Print the schedule, the pace and every bad row; returns whether the run could begin.

    Nothing is written, and no module that the settings name is imported.

    Args:
        resume: what it would go on from, as `find_resume` takes it.
    """
    found = [str(problem) for problem in problems(settings, runs=False)]
    with _noted(found):
        check_output(settings, resume)
    family = family_of(settings.model)
    spec, whole = None, False
    with _noted(found, "model: "):
        spec = family.read_spec(settings.model)
        steps = DenoiseSteps.of(settings, spec.boundary, spec.two_experts)
        console.print(_schedule_table(settings, steps))
        steps.check_tail()
        if spec.from_files:
            family.check_files(settings.model)
        whole = True
    geometry = family.GEOMETRY if spec is None else spec.geometry
    there = spec is not None and spec.from_files
    with _noted(found):
        device_bytes = _device_bytes(settings, there)
        if whole:
            found += _look_at_memory(settings, geometry, device_bytes, console)
    for section, videos in (("data", settings.data), ("validation", settings.validation)):
        lines = _look_at(section, videos, geometry, settings, console)
        if section == "validation" or settings.data.bad_rows == "error":
            found += lines
    for problem in found:
        console.print(f"[bold red]problem[/] {escape(problem)}", soft_wrap=True, highlight=False)
    could = "this run could begin" if there else "this run could begin once the files of the model are there"
    console.print(could if not found else f"{len(found)} problems", highlight=False)
    return not found


@contextmanager
def _noted(found: list[str], where: str = "") -> Iterator[None]:
    """What is wrong within the block joins `found`."""
    try:
        yield
    except FrostlineError as error:
        if str(error) not in found:
            found.append(f"{where}{error}")


def _device_bytes(settings: RunSettings, there: bool) -> int | None:
    """Memory of the device that is planned for: what the settings say, or else this machine's if it has the model."""
    if settings.memory.device_gb is not None:
        return int(settings.memory.device_gb * 1e9)
    return total_bytes(resolve_device(settings.device)) if there else None


def _look_at_memory(settings: RunSettings, geometry: Geometry, device_bytes: int | None, console: Console) -> list[str]:
    """What is wrong with the memory that a step needs."""
    plan = _memory_plan(settings, geometry, device_bytes)
    console.print(memory_table(plan))
    for entry in settings.rewards:
        if not isinstance(entry, RewardConfig):
            console.print(
                f"not counted: the networks of {escape(entry.type)}, which a dry run does not import", soft_wrap=True
            )
    problem = memory_problem(plan, settings)
    return [] if problem is None else [problem]


def _memory_plan(settings: RunSettings, geometry: Geometry, device_bytes: int | None) -> MemoryPlan:
    train, memory = settings.train, settings.memory
    return memory_plan(
        settings.model,
        settings,
        settings.video_shape(geometry),
        dtype=train.weight_dtype,
        engines=() if settings.plan.backend == TORCH else "all",
        num_processes=memory.num_processes,
        sharding=memory.sharding,
        device_bytes=device_bytes,
        rewards=[entry.build() for entry in settings.rewards if isinstance(entry, RewardConfig)],
    )


def _look_at(
    section: str, videos: VideoSettings, geometry: Geometry, settings: RunSettings, console: Console
) -> list[str]:
    """What is wrong with a data source, one line a row."""
    if section == "validation" and videos.source is None:
        return []
    try:
        dataset = videos.open(geometry)
    except FrostlineError as error:
        return [f"{section}: {error}"]
    check = dataset.check(deep=True)
    bad = check.bad
    console.print(f"{section}: {len(dataset) - len(bad)} of {len(dataset)} rows can be read", highlight=False)
    if check.short:
        console.print(f"{section}: {dataset.describe_padding(check.short)}", highlight=False)
    if section == "data" and len(bad) < len(dataset):
        console.print(_pace(settings, dataset, len(bad)), highlight=False)
    return [str(row) for row in bad]


def _pace(settings: RunSettings, dataset: VideoPromptDataset, bad: int) -> str:
    train = settings.train
    per_process = train.per_device_train_batch_size * train.gradient_accumulation_steps
    passes = per_process * train.max_train_steps / (len(dataset) - bad)
    return (
        f"{train.max_train_steps} steps of {per_process} samples a process: {passes:.3g} passes over the data "
        "with one process, N times as many with N"
    )


def _schedule_table(settings: RunSettings, steps: DenoiseSteps) -> Table:
    """Which step is frozen, which carries gradient, at which noise, and of two experts by which."""
    schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
    table = Table(title="one training step", title_justify="left")
    for column in ("step", "sigma", "timestep", "what runs"):
        table.add_column(column, justify="left" if column == "what runs" else "right")
    for index in range(settings.num_inference_steps):
        sigma, timestep = float(schedule.sigmas[index]), float(schedule.timesteps[index])
        if index < steps.mid:
            what = "rollout head: frozen"
        elif index <= steps.final:
            what = "denoise tail: gradient, and its KL reference (frozen)"
        else:
            what = "not run"
        if steps.high_noise and what != "not run":
            what = f"{what}; {'high' if index < steps.high_noise else 'low'}-noise expert"
        table.add_row(str(index), f"{sigma:.4f}", f"{timestep:.1f}", what)
    return table
