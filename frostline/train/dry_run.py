"""`frostline train --dry-run`: show the run and its problems without loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from torch.utils.data import Dataset, Subset

from frostline.errors import FrostlineError
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import FlowMatchSchedule
from frostline.models.video_shape import Geometry
from frostline.rewards.config import RewardConfig
from frostline.runtime.device import resolve_device, total_bytes
from frostline.stages.families import ModelSpec, family_of
from frostline.terminal.tables import Column, FittedTable
from frostline.train.data.dataset import Sample, VideoPromptDataset
from frostline.train.data.needs import SampleNeeds
from frostline.train.fit_memory import remedy_in_run
from frostline.train.loop.validation import Validation, starts_of
from frostline.train.memory.advice import memory_problem
from frostline.train.memory.search import find_remedy
from frostline.train.memory.table import memory_table, outcome_of, remedy_table
from frostline.train.precompute.preview import count_samples, count_there
from frostline.train.run_plan import RunPlanner
from frostline.train.settings import RunSettings, VideoSettings
from frostline.train.validate_settings import check_offload, check_output, problems


def print_dry_run(settings: RunSettings, console: Console, resume: str | None = None, starts: bool = True) -> bool:
    """Print the schedule, the number of epochs, the memory and every problem; return whether the run could begin.

    Nothing is written, and no module that the settings name is imported.

    Args:
        resume: what to resume from; see `find_resume`.
        starts: whether a run would begin in `output_dir`, which may contain another run.
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
        if whole and spec is not None:
            planner = _planner(settings, there, data)
            with _noted(found):
                check_offload(settings.offload.blocks, planner.on_cpu)
            _look_at_precomputing(settings, spec, planner, data, console, found)
            found += _look_at_memory(settings, planner, console)
    for problem in found:
        console.print(f"[bold red]problem[/] {escape(problem)}", soft_wrap=True, highlight=False)
    could = "the run can begin" if there else "the run can begin once the files of the model are available"
    console.print(could if not found else f"problems: {len(found)}", highlight=False)
    return not found


@contextmanager
def _noted(found: list[str], where: str = "") -> Iterator[None]:
    """Add the error raised within the block to `found`."""
    try:
        yield
    except FrostlineError as error:
        if str(error) not in found:
            found.append(f"{where}{error}")


def _planner(settings: RunSettings, there: bool, data: Mapping[str, _Looked]) -> RunPlanner:
    """Return a planner for the device memory in the settings or, if the model's files exist here, of this machine."""
    on_cpu, device_bytes = settings.device == "cpu", None
    if settings.memory.device_gb is not None:
        device_bytes = int(settings.memory.device_gb * 1e9)
    elif there:
        device = resolve_device(settings.device)
        on_cpu, device_bytes = device.type == "cpu", total_bytes(device)
    samples, (dataset, validation) = (0, 0), _sources(settings, data)
    if dataset is not None:
        samples = count_samples(settings, dataset, validation)
    return RunPlanner(settings, device_bytes, on_cpu, samples, data["data"].sizes)


def _sources(settings: RunSettings, data: Mapping[str, _Looked]) -> tuple[Dataset[Sample] | None, Validation | None]:
    held_out = data["validation"].readable
    return data["data"].readable, None if held_out is None else starts_of(settings.validation, held_out)


def _look_at_precomputing(
    settings: RunSettings,
    spec: ModelSpec,
    planner: RunPlanner,
    data: Mapping[str, _Looked],
    console: Console,
    found: list[str],
) -> None:
    """Print what is computed before the first step; its size is only known if the data can be read."""
    dataset, validation = _sources(settings, data)
    if dataset is None or found:
        return
    seen = planner.preview(settings)
    if seen.reason is not None:
        if settings.precompute == "always":
            found.append(f"precompute: always: {seen.reason}")
        console.print(f"precompute: nothing ({seen.reason})", soft_wrap=True, highlight=False)
        return
    console.print(f"precompute: {seen.estimate}", soft_wrap=True, highlight=False)
    if spec.from_files:
        there, total = count_there(settings, dataset, validation)
        where = escape(str(settings.frozen_cache_dir))
        console.print(f"precompute: {there} of {total} samples are already in {where}", soft_wrap=True, highlight=False)


def _look_at_memory(settings: RunSettings, planner: RunPlanner, console: Console) -> list[str]:
    """Print the memory of a step and, if it is too large, settings that make the run fit; return the problems left."""
    shape, plan = planner.shape(settings), planner.plan(settings)
    console.print(f"memory of a step of {shape}:", highlight=False)
    console.print(memory_table(plan))
    for entry in (*settings.rewards, *settings.validation.judges):
        if not isinstance(entry, RewardConfig):
            console.print(
                f"not included: the networks of {escape(entry.type)}, which a dry run does not import", soft_wrap=True
            )
    problem = memory_problem(plan)
    if problem is None:
        return []
    auto = settings.memory.fit == "auto"
    remedy = remedy_in_run(settings, planner) if auto else find_remedy(settings, planner)
    if remedy.steps:
        console.print(remedy_table(remedy))
    if auto and remedy.fits:
        console.print(f"memory.fit: auto: {outcome_of(remedy)}", soft_wrap=True, highlight=False)
        return []
    return [f"{problem}; {outcome_of(remedy)}"]


@dataclass(frozen=True)
class _Looked:
    """A data source.

    Attributes:
        wrong: one line for each invalid row, or one line if the source cannot be opened.
        readable: the valid rows as a dataset; None if there are none.
        sizes: heights and widths of their videos.
    """

    wrong: list[str]
    readable: Dataset[Sample] | None = None
    sizes: frozenset[tuple[int, int]] = frozenset()


def _look_at(
    section: str,
    videos: VideoSettings,
    geometry: Geometry,
    needs: SampleNeeds,
    settings: RunSettings,
    console: Console,
) -> _Looked:
    """Check a data source."""
    if section == "validation" and videos.source is None:
        return _Looked([])
    try:
        dataset = videos.open(geometry, needs)
    except FrostlineError as error:
        return _Looked([f"{section}: {error}"])
    check = dataset.check(deep=True)
    bad = check.bad
    console.print(f"{section}: {len(dataset) - len(bad)} of {len(dataset)} rows are valid", highlight=False)
    if check.short:
        console.print(f"{section}: {dataset.describe_padding(check.short)}", highlight=False)
    if section == "data" and len(bad) < len(dataset):
        console.print(_pace(settings, dataset, len(bad)), highlight=False)
    names = {row.sample_id for row in bad}
    good = [index for index, name in enumerate(dataset.sample_ids) if name not in names]
    readable = Subset(dataset, good) if good and bad else dataset if good else None
    return _Looked([str(row) for row in bad], readable, check.sizes)


def _pace(settings: RunSettings, dataset: VideoPromptDataset, bad: int) -> str:
    train = settings.train
    per_process = train.per_device_train_batch_size * train.gradient_accumulation_steps
    passes = per_process * train.max_train_steps / (len(dataset) - bad)
    return (
        f"{train.max_train_steps} steps of {per_process} samples per process: {passes:.3g} "
        "epochs with one process, N times as many with N processes"
    )


def _schedule_table(settings: RunSettings, steps: DenoiseSteps) -> FittedTable:
    """Return a table of the steps: frozen or with a gradient, their noise level, and the expert."""
    schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
    numbers = (Column(title, right=True) for title in ("step", "sigma", "timestep"))
    table = FittedTable(*numbers, Column("what runs", wraps=True), title="one training step")
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
    live = "with gradient, and KL reference (frozen)"
    if not steps.with_lora([index]):
        live = "gradient to its latents only, without LoRA"
    share = f", in {steps.num_steps} of these {len(live_steps)} steps per training step" if steps.drawn else ""
    return f"denoise tail: {live}{share}"
