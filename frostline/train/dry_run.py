"""`frostline train --dry-run`: what would run, and what is wrong with it, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import Dataset, Subset

from frostline.errors import FrostlineError
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.video_shape import Geometry
from frostline.rewards.build import JUDGES, make_builtin
from frostline.rewards.config import RewardConfig
from frostline.runtime.backends import TORCH
from frostline.runtime.device import resolve_device, total_bytes
from frostline.stages.families import ModelSpec, family_of
from frostline.train.data.dataset import Sample, VideoPromptDataset
from frostline.train.data.needs import SampleNeeds
from frostline.train.loop.validation import starts_of
from frostline.train.memory.advice import memory_problem
from frostline.train.memory.memory_profile import judge_bytes
from frostline.train.memory.plan import MemoryPlan, memory_plan
from frostline.train.memory.table import memory_table
from frostline.train.precompute.preview import count_there, preview
from frostline.train.settings import RunSettings, VideoSettings
from frostline.train.validate_settings import check_output, problems


def print_dry_run(settings: RunSettings, console: Console, resume: str | None = None, starts: bool = True) -> bool:
    """Print the schedule, the pace and every bad row; returns whether the run could begin.

    Nothing is written, and no module that the settings name is imported.

    Args:
        resume: what it would go on from, as `find_resume` takes it.
        starts: whether a run is to begin in `output_dir`, which another one may be in.
    """
    found = [str(problem) for problem in problems(settings, runs=False)]
    if starts:
        with _noted(found):
            check_output(settings, resume)
    family = family_of(settings.model)
    spec, whole = None, False
    with _noted(found, "model: "):
        spec = family.read_spec(settings.model)
        steps = DenoiseSteps.of(settings, spec.boundary, spec.two_experts)
        console.print(_schedule_table(settings, steps))
        steps.check_live()
        if spec.from_files:
            family.check_files(settings.model)
        whole = True
    geometry = family.GEOMETRY if spec is None else spec.geometry
    there = spec is not None and spec.from_files
    judges = settings.validation.judges
    data: dict[str, _Looked] = {}
    for section, videos, others in (("data", settings.data, ()), ("validation", settings.validation, judges)):
        rewards = (*settings.rewards, *others)
        on_clips = section == "data" and settings.sft_weight > 0
        needs = SampleNeeds("") if spec is None else SampleNeeds.of(spec.name, spec.needs_image, rewards, on_clips)
        data[section] = _look_at(section, videos, geometry, needs, settings, console)
        if section == "validation" or settings.data.bad_rows == "error":
            found += data[section].wrong
    with _noted(found):
        device_bytes = _device_bytes(settings, there)
        if whole and spec is not None:
            stages = _look_at_precomputing(settings, spec, data, device_bytes, console, found)
            found += _look_at_memory(settings, geometry, device_bytes, stages, console)
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


def _look_at_precomputing(
    settings: RunSettings,
    spec: ModelSpec,
    data: Mapping[str, _Looked],
    device_bytes: int | None,
    console: Console,
    found: list[str],
) -> tuple[str, ...]:
    """Tell what is computed before the first step, which takes readable data; return the stages."""
    dataset, held_out = data["data"].readable, data["validation"].readable
    if dataset is None or found:
        return ()
    validation = None if held_out is None else starts_of(settings.validation, held_out)
    seen = preview(settings, spec, dataset, validation, device_bytes)
    if seen.reason is not None:
        if settings.precompute == "always":
            found.append(f"precompute: always: {seen.reason}")
        console.print(f"precompute: nothing ({seen.reason})", soft_wrap=True, highlight=False)
        return ()
    console.print(f"precompute: {seen.estimate}", soft_wrap=True, highlight=False)
    if spec.from_files:
        there, total = count_there(settings, dataset, validation)
        where = escape(str(settings.frozen_cache_dir))
        console.print(f"precompute: {there} of {total} samples are in {where}", soft_wrap=True, highlight=False)
    return seen.stages


def _look_at_memory(
    settings: RunSettings, geometry: Geometry, device_bytes: int | None, precomputed: Sequence[str], console: Console
) -> list[str]:
    """What is wrong with the memory that a step needs."""
    plan = _memory_plan(settings, geometry, device_bytes, precomputed)
    console.print(memory_table(plan))
    for entry in (*settings.rewards, *settings.validation.judges):
        if not isinstance(entry, RewardConfig):
            console.print(
                f"not counted: the networks of {escape(entry.type)}, which a dry run does not import", soft_wrap=True
            )
    problem = memory_problem(plan, settings)
    return [] if problem is None else [problem]


def _memory_plan(
    settings: RunSettings, geometry: Geometry, device_bytes: int | None, precomputed: Sequence[str]
) -> MemoryPlan:
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
        rewards=[reward for reward, _ in make_builtin(settings.rewards)],
        judges=dict(judge_bytes(*made) for made in make_builtin(settings.validation.judges, JUDGES)),
        precomputed=precomputed,
        quantization=settings,
    )


@dataclass(frozen=True)
class _Looked:
    """A data source. wrong: one line for each row at fault. readable: its other rows, if there are any."""

    wrong: list[str]
    readable: Dataset[Sample] | None = None


def _look_at(
    section: str,
    videos: VideoSettings,
    geometry: Geometry,
    needs: SampleNeeds,
    settings: RunSettings,
    console: Console,
) -> _Looked:
    """What is wrong with a data source, and what is not."""
    if section == "validation" and videos.source is None:
        return _Looked([])
    try:
        dataset = videos.open(geometry, needs)
    except FrostlineError as error:
        return _Looked([f"{section}: {error}"])
    check = dataset.check(deep=True)
    bad = check.bad
    console.print(f"{section}: {len(dataset) - len(bad)} of {len(dataset)} rows can be read", highlight=False)
    if check.short:
        console.print(f"{section}: {dataset.describe_padding(check.short)}", highlight=False)
    if section == "data" and len(bad) < len(dataset):
        console.print(_pace(settings, dataset, len(bad)), highlight=False)
    names = {row.sample_id for row in bad}
    good = [index for index, name in enumerate(dataset.sample_ids) if name not in names]
    return _Looked([str(row) for row in bad], Subset(dataset, good) if good and bad else dataset if good else None)


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
        what = _what_runs(steps, index)
        if steps.high_noise and what != "not run":
            what = f"{what}; {'high' if index < steps.high_noise else 'low'}-noise expert"
        table.add_row(str(index), f"{sigma:.4f}", f"{timestep:.1f}", what)
    return table


def _what_runs(steps: DenoiseSteps, index: int) -> str:
    if index > steps.end:
        return "not run"
    live_steps = steps.may_be_live
    with_graph = steps.with_graph(live_steps)
    if index not in with_graph:
        return "rollout head: frozen" if not with_graph or index < with_graph[0] else "denoise tail: frozen"
    live = "gradient, and its KL reference (frozen)"
    if not steps.with_lora([index]):
        live = "gradient through its latents, without LoRA"
    share = f" in {steps.num_steps} of {len(live_steps)} of these steps" if steps.drawn else ""
    return f"denoise tail: {live}{share}"
