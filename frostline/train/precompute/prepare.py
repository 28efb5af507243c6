"""Precompute frozen outputs for a run: decide whether it is worthwhile, load the stages, and run the passes."""

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
from frostline.runtime.device import free_memory, total_bytes
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.data.dataset import Sample
from frostline.train.loop.state import unchanged_random
from frostline.train.loop.validation import Validation
from frostline.train.precompute.frozen import Frozen, FrozenModel, FrozenReferences, load_without_live_parts
from frostline.train.precompute.passes import count_rows, index, run_passes
from frostline.train.precompute.sizes import Estimate, estimate, is_small, reason_against, too_large
from frostline.train.precompute.visits import Visit, visits
from frostline.train.processes import gather_from_processes, process_count
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The position of a run: completed optimizer steps, samples used in these, and the number of processes."""

    step: int = 0
    position: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Precomputed:
    """The result of precomputing.

    Attributes:
        stages: stages that the run does not need, because all their outputs are cached.
        estimate: estimated size; None if there was nothing to precompute.
        computed: number of rows, in all processes, that were not in the cache before.
    """

    stages: frozenset[str] = frozenset()
    estimate: Estimate | None = None
    computed: int = 0

    def __str__(self) -> str:
        if self.estimate is None:
            return "nothing to precompute"
        training, held_out = self.estimate.samples
        starts = f" and {held_out} validation samples" if held_out else ""
        return f"{training} samples{starts}: computed {self.computed} frozen outputs, the others were already cached"


def precompute(
    settings: RunSettings,
    dataset: Dataset[Sample],
    validation: Validation | None,
    device: torch.device,
    progress: Progress,
    place: Place | None = None,
    batch_size: int | None = None,
) -> Precomputed:
    """Compute the frozen outputs of a run's samples into its cache, depending on `settings.precompute`; called on
    all processes.

    Args:
        place: position from which the run continues.
        batch_size: see `run_passes`.
    Raises:
        ConfigError: `always`, and the cache is too small.
        FrostlineError: the outputs cannot be computed or stored. With `auto` and one process, the run continues without
            them instead.
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
    with progress.task(f"inspect {settings.model}"):
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
        # With several processes, the others may have got further, so this one cannot continue without precomputing.
        if not auto or process_count() > 1:
            raise
        log.warning("precompute: auto: continuing without it: %s", error)
        return Precomputed()
    return Precomputed(frozenset(expected.stages), expected, sum(gather_from_processes(computed)))


def _in_two_rounds(
    settings: RunSettings, asked: list[Visit], model: VideoModel, progress: Progress, batch_size: int | None
) -> int:
    """Run the stages of the model first, then those of rewards, whose networks are in memory only during this time."""
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
