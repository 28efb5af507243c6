"""What can be told of a run's settings before its model is loaded, which takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from frostline.config import AUTO
from frostline.errors import ConfigError, FrostlineError
from frostline.rewards.build import check_rewards, resolve
from frostline.rewards.config import stage_names
from frostline.runtime.backends import TORCH, check_backend
from frostline.stages.families import family_of
from frostline.stages.shapes import parse_shapes
from frostline.train.loop.checkpoint import Checkpoint
from frostline.train.loop.output_dir import begins_in, check_start, check_writable
from frostline.train.loop.resume import check_fits, find_resume
from frostline.train.loop.trackers import check_trackers
from frostline.train.settings import RunSettings


def problems(settings: RunSettings, runs: bool) -> Iterator[FrostlineError]:
    """All that is wrong, one by one.

    Args:
        runs: whether the run follows; where it does not, no module that the settings name is imported.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_rewards(settings.rewards, runs),
        lambda: _check_plan(settings, runs),
        lambda: check_trackers(settings.train.report_to),
        lambda: family_of(settings.model).check_lora(settings.model, settings.lora),
    ]
    for check in checks:
        try:
            check()
        except FrostlineError as error:
            yield error


def check_output(settings: RunSettings, resume: str | None) -> Checkpoint | None:
    """Look whether a run may write to its folder, and what it goes on from there; touches nothing.

    Args:
        resume: as `find_resume` takes it.
    Raises:
        ConfigError: the folder holds another run, or the checkpoint is of another adapter.
        CheckpointError: the folder cannot be written to, or there is no such checkpoint, or it is damaged.
    """
    folder = settings.output_dir
    check_writable(folder)
    checkpoint = find_resume(folder, resume)
    if begins_in(folder, checkpoint):
        check_start(folder, checkpoint, settings.overwrite_output_dir, restart=resume is not None)
    if checkpoint is not None:
        check_fits(checkpoint, settings)
    return checkpoint


def _check_plan(settings: RunSettings, runs: bool) -> None:
    plan = settings.plan
    family = family_of(settings.model)
    of_rewards = stage_names(resolve(settings.rewards) if runs else settings.rewards)
    # Which stages a reward of the user's brings only importing it would tell.
    if of_rewards is not None:
        known = (*family.STAGES, *of_rewards)
        for stage in plan.stages:
            if stage not in known:
                raise ConfigError(f"plan.stages: there is no stage {stage!r}, only {', '.join(known)}")
    for backend in {plan.backend, *plan.stages.values()} - {AUTO, TORCH}:
        check_backend(backend)
    parse_shapes(plan.min_shapes, plan.opt_shapes, plan.max_shapes, family.GEOMETRY)
