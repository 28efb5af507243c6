"""Precompute for a run: decide, load, go through the passes; afterwards training does without the stages at work."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from frostline.errors import ConfigError, FrostlineError
from frostline.progress import Progress
from frostline.rewards.build import resolve
from frostline.rewards.inputs import KEEPS
from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.device import total_bytes
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.data.dataset import Sample
from frostline.train.loop.state import unchanged_random
from frostline.train.loop.validation import Validation
from frostline.train.precompute.frozen import (
    Frozen,
    FrozenModel,
    FrozenReferences,
    free_memory,
    load_without_live_parts,
)
from frostline.train.precompute.passes import count_rows, index, run_passes
from frostline.train.precompute.sizes import Estimate, estimate, is_small, reason_against, too_large
from frostline.train.precompute.visits import Visit, visits
from frostline.train.processes import gather_from_processes, process_count
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a run is: optimizer steps done, samples dealt in these, and its number of processes."""

    step: int = 0
    position: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Precomputed:
    """What was done.

    stages: that the run does without, because all that they would compute is in the cache. estimate: of what that
    takes; None where nothing was to be precomputed. computed: rows, of all processes, that were not there before.
    """

    stages: frozenset[str] = frozenset()
    estimate: Estimate | None = None
    computed: int = 0

    def __str__(self) -> str:
        if self.estimate is None:
            return "nothing to precompute"
        training, held_out = self.estimate.samples
        starts = f" and {held_out} held-out starts" if held_out else ""
        return f"{training} samples{starts}: {self.computed} frozen outputs computed, the others were there"


def precompute(
    settings: RunSettings,
    dataset: Dataset[Sample],
    validation: Validation | None,
    device: torch.device,
    progress: Progress,
    place: Place | None = None,
    batch_size: int | None = None,
) -> Precomputed:
    """Compute what is frozen of the samples of a run into its cache, as `settings.precompute` says; in all processes.

    Args:
        place: where the run is to go on.
        batch_size: see `run_passes`.
    Raises:
        ConfigError: `always`, and the cache cannot hold all of it.
        FrostlineError: `always`, and it cannot be computed or kept. Under `auto` the run goes on without.
    """
    auto, device_bytes = settings.precompute == "auto", total_bytes(device)
    if settings.precompute == "never" or (auto and all(gather_from_processes(is_small(settings, device_bytes)))):
        return Precomputed()
    place = place or Place(processes=process_count())
    asked = visits(
        settings,
        dataset,
        validation,
        processes=place.processes,
        step=place.step,
        position=place.position,
    )
    with progress.task(f"look at {settings.model}"):
        model = load_without_live_parts(settings, device)
    held_out = 0 if validation is None else len(validation.starts)
    expected = estimate(model, settings, (sum(len(each.rows) for each in asked) - held_out, held_out))
    if not auto:
        if reason := too_large(expected, settings):
            raise ConfigError(f"precompute: always: {reason}")
    # The devices of processes may differ.
    elif reason := gather_from_processes(reason_against(expected, settings, device_bytes))[0]:
        log.info("precompute: auto: nothing is computed before the first step: %s", reason)
        return Precomputed()
    log.info("precompute: %s", expected)
    try:
        with unchanged_random():
            computed = _in_two_rounds(settings, asked, model, progress, batch_size)
    except FrostlineError as error:
        # Of several processes, the others may be further.
        if not auto or process_count() > 1:
            raise
        log.warning("precompute: auto: going on without: %s", error)
        return Precomputed()
    return Precomputed(frozenset(expected.stages), expected, sum(gather_from_processes(computed)))


def _in_two_rounds(
    settings: RunSettings, asked: list[Visit], model: VideoModel, progress: Progress, batch_size: int | None
) -> int:
    """First the model's own stages; then the rewards', whose networks are in memory only meanwhile."""
    shapes = settings.plan.shape_range(family_of(settings.model).GEOMETRY)
    cache = FrozenOutputCache(settings.frozen_cache_dir, settings.cache_bytes)
    frozen: Frozen = FrozenModel.of_settings(model, settings, shapes, cache)
    computed = _one_round(frozen, asked, cache, progress, "precompute", batch_size)
    if any(config.needs & KEEPS for config in resolve(settings.rewards)):
        frozen = FrozenReferences.of_settings(model, settings, shapes, cache)
        computed += _one_round(frozen, asked, cache, progress, "precompute references", batch_size)
    del frozen
    free_memory()
    return computed


def _one_round(
    frozen: Frozen,
    asked: list[Visit],
    cache: FrozenOutputCache,
    progress: Progress,
    name: str,
    batch_size: int | None,
) -> int:
    with progress.bar(f"{name}: read samples", -(-len(asked) // process_count())) as bar:
        indexed = index(frozen, asked, lambda rows: bar.advance(1))
    with progress.bar(name, count_rows(indexed)) as bar:
        return run_passes(frozen, indexed, cache, bar, batch_size)
