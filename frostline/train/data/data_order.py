"""The order of samples: an endless shuffled sequence, split into batches and distributed to the processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class DataOrder:
    """The order of a run, which depends only on the seed and on the number of samples used so far.

    Every epoch is a permutation of all samples, and epochs follow each other without a gap: a batch may contain the
    last sample of one epoch and the first of the next. Processes get batches in turn, so that N processes with batch
    size B train like one process with batch size N×B, also if a run is resumed with another N.

    Attributes:
        samples: number of samples.
        batch_size: number of samples in a batch of one process.
        position: number of samples used so far by all processes.
    """

    samples: int
    batch_size: int
    seed: int
    processes: int = 1
    process: int = 0
    position: int = 0

    def at(self, position: int) -> DataOrder:
        """Return the same order from another position on."""
        return replace(self, position=position)

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of this process's batches without end."""
        stream = self._stream()
        while True:
            for process in range(self.processes):
                batch = [next(stream) for _ in range(self.batch_size)]
                if process == self.process:
                    yield batch

    def _stream(self) -> Iterator[int]:
        epoch, offset = divmod(self.position, self.samples)
        generator = torch.Generator().manual_seed(self.seed)
        for number in itertools.count():
            # The order equals that of `DataLoader(shuffle=True, generator=…)`, which draws a seed for its workers
            # before each epoch's permutation, and a second, unused permutation after it.
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            order = torch.randperm(self.samples, generator=generator)
            torch.randperm(self.samples, generator=generator)
            if number >= epoch:
                yield from order[offset if number == epoch else 0 :].tolist()


class BatchesOf(Sampler[list[int]]):
    """A `DataOrder` as the batch sampler of a `DataLoader`."""

    def __init__(self, order: DataOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.batches()
