"""Preview of precomputing for memory plans and dry runs: stages, size on disk, and the number of cached samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.identity.fingerprint import digest_memo
from frostline.runtime.user_cache import recall
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.data.dataset import Sample
from frostline.train.loop.validation import Validation
from frostline.train.precompute.frozen import FrozenModel, frozen_stages, load_without_live_parts
from frostline.train.precompute.passes import entries, index, passes_of
from frostline.train.precompute.sizes import Estimate, estimate, reason_against, too_large
from frostline.train.precompute.visits import visits
from frostline.train.settings import RunSettings


@dataclass(frozen=True)
class Preview:
    """What would be precomputed.

    Attributes:
        estimate: estimated size.
        reason: why nothing is precomputed; None if something is.
    """

    estimate: Estimate
    reason: str | None

    @property
    def stages(self) -> tuple[str, ...]:
        """Return the stages that training does not need afterwards."""
        return () if self.reason else self.estimate.stages


def preview(settings: RunSettings, model: VideoModel, samples: tuple[int, int], device_bytes: int | None) -> Preview:
    """Return what a run with these settings precomputes, computed only from sizes.

    Args:
        model: its weights need not be in memory.
        samples: see `count_samples`.
        device_bytes: memory of the device; None if unknown.
    """
    estimated = estimate(model, settings, samples)
    if settings.precompute == "never":
        return Preview(estimated, "never")
    if settings.precompute == "always":
        return Preview(estimated, too_large(estimated, settings))
    if device_bytes is None:
        return Preview(estimated, "auto depends on the device's memory, which is unknown: set memory.device_gb")
    return Preview(estimated, reason_against(estimated, settings, device_bytes))


def count_samples(settings: RunSettings, dataset: Dataset[Sample], validation: Validation | None) -> tuple[int, int]:
    """Count the different samples that a run trains on, and the validation samples."""
    held_out = 0 if validation is None else len(validation.starts)
    asked = visits(settings, dataset, validation, processes=settings.memory.num_processes)
    return sum(len(each.rows) for each in asked) - held_out, held_out


def count_there(settings: RunSettings, dataset: Dataset[Sample], validation: Validation | None) -> tuple[int, int]:
    """Count the samples, including validation samples, whose model outputs are all in the cache, and all samples.

    Reads the samples but no weights: cache entries depend on the digests of weights; if a digest was never computed on
    this machine, there are no entries. References of rewards, whose networks would have to be loaded, are not counted.
    """
    asked = visits(settings, dataset, validation, processes=settings.memory.num_processes)
    total = sum(len(each.rows) for each in asked)
    family = family_of(settings.model)
    if not settings.frozen_cache_dir.is_dir():
        return 0, total
    # On the CPU: weights are not loaded, and their digests do not depend on the device.
    model = load_without_live_parts(settings, torch.device("cpu"))
    shapes = settings.plan.shape_range(family.GEOMETRY)
    names = frozen_stages(model, settings, family.FROZEN_STAGES)
    stages = [stage for stage in model.stages(shapes) if stage.name in names]
    if any(s.weights is not None and recall(digest_memo(s, s.weights)) is None for s in stages):
        return 0, total
    cache = FrozenOutputCache(settings.frozen_cache_dir, settings.cache_bytes)
    frozen = FrozenModel.of_settings(model, settings, shapes, cache, verify=False)
    indexed = index(frozen, asked)
    missing = 0
    for each in indexed:
        owed = [entries(frozen, each, of_pass) for of_pass in passes_of(indexed)]
        rows = zip(*owed, strict=True)
        missing += sum(any(cache.on_disk(key) is None for keys in row for key in keys) for row in rows)
    return total - missing, total
