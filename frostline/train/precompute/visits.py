"""The samples that a run will read, and their batches: first for validation, then for training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.train.data.data_order import DataOrder
from frostline.train.data.dataset import CollatedBatch, Sample, collate
from frostline.train.loop.evaluation import start_noise
from frostline.train.loop.validation import Validation, own_starts
from frostline.train.settings import RunSettings
from frostline.train.step.rollout import fixed_noise

Noise = Callable[[tuple[int, ...], Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """A source of samples.

    Attributes:
        noise: maps the shape (C, F, h, w) and the samples' indices to start noise (B, C, F, h, w) on the CPU; None if
            the noise is fresh at each step.
        on_clips: whether the latents of the samples' own clips are needed.
        autocast: autocast type when the run first uses the samples; None without autocast.
    """

    dataset: Dataset[Sample]
    noise: Noise | None
    on_clips: bool = False
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Visit:
    """Samples that are processed together.

    Attributes:
        rows: their indices; each occurs once in all visits to its source.
    """

    source: Source
    rows: tuple[int, ...]

    def read(self) -> CollatedBatch:
        """Read the samples.

        Raises:
            DataError: a sample cannot be read.
        """
        return collate([self.source.dataset[row] for row in self.rows])


def visits(
    settings: RunSettings,
    dataset: Dataset[Sample],
    validation: Validation | None,
    *,
    processes: int = 1,
    step: int = 0,
    position: int = 0,
) -> list[Visit]:
    """Return the visits of a run, with each sample in the batch in which the run uses it first.

    A row's last bits may depend on the other rows of its batch; visits with the same batches yield the same results as
    the run.

    Args:
        processes: number of processes of the run.
        step, position: completed optimizer steps, and samples used in these.
    """
    made = [] if validation is None else _of_validation(settings, validation, processes)
    return [*made, *_of_training(settings, dataset, processes, step, position)]


def _of_validation(settings: RunSettings, validation: Validation, processes: int) -> list[Visit]:
    noise = partial(_start_noise, validation.noise_seed)
    # The inputs are those of a training step.
    source = Source(validation.dataset, noise, on_clips=settings.sft_weight > 0)
    starts, batches = list(validation.starts), []
    for process in range(processes):
        own, size = own_starts(starts, process, processes), validation.batch_size
        batches += [own[first : first + size] for first in range(0, len(own), size)]
    return _first_visits(source, batches, len(starts))


def _of_training(
    settings: RunSettings, dataset: Dataset[Sample], processes: int, step: int, position: int
) -> list[Visit]:
    train, seed = settings.train, settings.noise_seed
    source = Source(
        dataset,
        None if seed is None else partial(_fixed_noise, seed),
        on_clips=settings.sft_weight > 0,
        autocast=torch.bfloat16 if train.mixed_precision == "bf16" else None,
    )
    samples = len(dataset)  # type: ignore[arg-type]
    # N processes together use the same samples as one process with N times as many batches.
    order = DataOrder(samples, train.per_device_train_batch_size, train.seed, position=position)
    batches = (train.max_train_steps - step) * train.gradient_accumulation_steps * processes
    return _first_visits(source, itertools.islice(order.batches(), batches), samples)


def _first_visits(source: Source, batches: itertools.islice[list[int]] | list[list[int]], samples: int) -> list[Visit]:
    """Return, for each batch, the samples that are in no earlier batch, until all have occurred."""
    seen: set[int] = set()
    found = []
    for batch in batches:
        fresh = tuple(row for row in dict.fromkeys(batch) if row not in seen)
        if fresh:
            seen.update(fresh)
            found.append(Visit(source, fresh))
        if len(seen) == samples:
            break
    return found


def _start_noise(seed: int, shape: tuple[int, ...], rows: Sequence[int]) -> Tensor:
    return start_noise(shape, seed, rows)


def _fixed_noise(seed: int, shape: tuple[int, ...], rows: Sequence[int]) -> Tensor:
    return fixed_noise(seed, len(rows), shape)
