"""`frostline train --dry-run`: what would run, and what is wrong with it, without loading a model."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frostline.errors import FrostlineError
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.faces.embedders import load_embedder
from frostline.models.geometry import SPATIAL_MULTIPLE
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.skeleton import read_skeleton
from frostline.runtime.backends import TORCH
from frostline.train.data import VideoPromptDataset
from frostline.train.memory import MemoryPlan, memory_plan
from frostline.train.memory_table import memory_table
from frostline.train.preflight import problems
from frostline.train.settings import RunSettings, VideoSettings


def print_dry_run(settings: RunSettings, console: Console, fresh: bool = True) -> bool:
    """Print the schedule, the pace and every bad row; returns whether the run could begin.

    Args:
        fresh: whether it would start anew, and not go on from a checkpoint.
    """
    found, multiple, there = [str(problem) for problem in problems(settings, fresh)], SPATIAL_MULTIPLE, False
    try:
        skeleton = read_skeleton(settings.model)
        multiple, there = skeleton.spatial_multiple, skeleton.from_files
        steps = DenoiseSteps.of(settings, skeleton.boundary, "denoiser_high_noise" in skeleton.networks)
        console.print(_schedule_table(settings, steps))
        steps.check_tail()
        console.print(memory_table(_memory_plan(settings, multiple)))
    except FrostlineError as error:
        if str(error) not in found:
            found.append(f"model: {error}")
    for section, videos in (("data", settings.data), ("validation", settings.validation)):
        lines = _look_at(section, videos, multiple, settings, console)
        if section == "validation" or settings.data.bad_rows == "error":
            found += lines
    for problem in found:
        console.print(f"[bold red]problem[/] {escape(problem)}", soft_wrap=True, highlight=False)
    could = "this run could begin" if there else "this run could begin once the files of the model are there"
    console.print(could if not found else f"{len(found)} problems", highlight=False)
    return not found


def _memory_plan(settings: RunSettings, multiple: int) -> MemoryPlan:
    train, memory = settings.train, settings.memory
    faces = settings.reward.face_identity
    return memory_plan(
        settings.model,
        settings,
        settings.video_shape(multiple),
        dtype=train.weight_dtype,
        engines=() if settings.plan.backend == TORCH else "all",
        num_processes=memory.num_processes,
        sharding=memory.sharding,
        device_bytes=None if memory.device_gb is None else int(memory.device_gb * 1e9),
        embedder=None if faces is None else load_embedder(faces.embedder),  # type: ignore[arg-type]
    )


def _look_at(section: str, videos: VideoSettings, multiple: int, settings: RunSettings, console: Console) -> list[str]:
    """What is wrong with a data source, one line a row."""
    if section == "validation" and videos.source is None:
        return []
    try:
        dataset = videos.open(multiple)
    except FrostlineError as error:
        return [f"{section}: {error}"]
    bad = dataset.validate(deep=True)
    console.print(f"{section}: {len(dataset) - len(bad)} of {len(dataset)} rows can be read", highlight=False)
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
