"""In which order samples come: one endless shuffled stream, cut into batches, dealt to the processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class DataOrder:
    """The order of a run: a function of the seed and of how many samples were dealt, and of nothing else.

    Every epoch is a permutation of all samples, and one epoch follows the other without a gap: a batch may hold the
    last sample of one epoch and the first of the next. Processes take turns, batch by batch, so that N processes see
    at each step what one process with N times the batch would see, whatever N a run is resumed with.

    samples: how many there are. batch_size: per process. position: samples dealt so far, to all processes together.
    """

    samples: int
    batch_size: int
    seed: int
    processes: int = 1
    process: int = 0
    position: int = 0

    def at(self, position: int) -> DataOrder:
        """The same order, from another place on."""
        return replace(self, position=position)

    def batches(self) -> Iterator[list[int]]:
        """The indices of this process's batches, without end."""
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
            # The order is the one that `DataLoader(shuffle=True, generator=…)` gives. It draws a seed for its workers
            # before each epoch's permutation, and a second permutation, of which it uses nothing, after it.
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
