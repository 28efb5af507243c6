"""Apply `memory.fit: auto` and `offload.blocks: auto` to the settings of a run, and log the changes.

With `memory.fit: auto`, settings are changed if the run does not fit in the memory of its devices. `offload.blocks:
auto` is replaced by the number of blocks whose weights are offloaded to main memory.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from frostline.config import AUTO
from frostline.errors import ConfigError
from frostline.train.memory.advice import memory_problem
from frostline.train.memory.measures import MEASURES
from frostline.train.memory.search import Remedy, find_remedy, with_changes
from frostline.train.memory.table import outcome_of, overrides_of
from frostline.train.run_plan import RunPlanner
from frostline.train.settings import MemorySettings, RunSettings

log = logging.getLogger(__name__)

# The number of processes and the dtypes are set before the memory is planned; the rank of an adapter must not change.
_IN_RUN = tuple(measure for measure in MEASURES if measure.in_run)


def fit_to_memory(
    settings: RunSettings,
    machine: MemorySettings,
    on_cpu: bool,
    samples: tuple[int, int],
    sizes: Collection[tuple[int, int]],
) -> RunSettings:
    """Return the settings with the least costly changes that make the run fit, and log each change.

    Changes that affect what is trained are logged as warnings. `offload.blocks: auto` is replaced by a number, also
    with `memory.fit: never`.

    Args:
        machine: the machine of the run: its `device_gb`, `num_processes` and `sharding` are used.
        on_cpu, samples, sizes: see `RunPlanner`.
    Raises:
        ConfigError: the changes that are possible when a run starts are not sufficient.
    """
    assert machine.device_gb is not None
    there = settings.model_copy(update={"memory": machine})
    planner = RunPlanner(there, int(machine.device_gb * 1e9), on_cpu, samples, sizes)
    problem = memory_problem(planner.plan(there))
    if problem is None or settings.memory.fit == "never":
        return _with_number(settings, there, planner)
    remedy = remedy_in_run(there, planner)
    if not remedy.fits:
        raise ConfigError(f"memory.fit: auto: {problem}; {outcome_of(remedy)}")
    log.info("memory.fit: auto: %s; %s", problem, outcome_of(remedy))
    for step in remedy.steps:
        given = " ".join(overrides_of(step.changes))
        if step.measure.costs == "results":
            log.warning("memory.fit: auto: %s: %s: this changes what is trained", given, step.measure.about)
        else:
            log.info("memory.fit: auto: %s: %s", given, step.measure.about)
        settings = with_changes(settings, step.changes)
    return _with_number(settings, remedy.settings, planner)


def _with_number(settings: RunSettings, planned: RunSettings, planner: RunPlanner) -> RunSettings:
    """Return the settings with `offload.blocks: auto` replaced by the number of blocks in the plan."""
    if settings.offload.blocks != AUTO:
        return settings
    plan = planner.plan(planned)
    log.info(
        "offload.blocks: auto: %d blocks of each denoiser are offloaded to main memory, %.2f GB",
        plan.offloaded_blocks,
        plan.main_memory / 1e9,
    )
    return with_changes(settings, {"offload.blocks": plan.offloaded_blocks})


def remedy_in_run(settings: RunSettings, planner: RunPlanner) -> Remedy:
    """Return the changes that make a run fit, from those that are possible when it starts."""
    return find_remedy(settings, planner, _IN_RUN)
