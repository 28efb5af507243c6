"""Load batches in the order of the run, with worker processes that decode ahead and are restarted if killed."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError

import torch
from torch.utils.data import DataLoader, Dataset

from frostline.errors import DataError
from frostline.train.data.data_order import BatchesOf, DataOrder
from frostline.train.data.dataset import CollatedBatch, Sample, collate, tell_once

log = logging.getLogger(__name__)

_RESTARTS = 3


class Batches:
    """An endless iterator over the batches of one process.

    Raises, while iterating:
        DataError: a sample cannot be read, or the workers were killed too often.
    """

    def __init__(self, dataset: Dataset[Sample], order: DataOrder, num_workers: int) -> None:
        self.dataset = dataset
        self.order = order
        self.num_workers = num_workers
        self._batches = self._start()

    def __iter__(self) -> Iterator[CollatedBatch]:
        return self

    def __next__(self) -> CollatedBatch:
        batch = self._next_batch()
        if isinstance(batch, DataError):
            raise batch
        tell_once(batch["notes"])
        self.order = self.order.at(self.order.position + self.order.batch_size * self.order.processes)
        return batch

    def close(self) -> None:
        """End the workers."""
        del self._batches

    def _next_batch(self) -> CollatedBatch | DataError:
        for restart in itertools.count(1):
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                if not self._lost_a_worker(error):
                    raise
                if restart > _RESTARTS:
                    raise DataError(
                        f"data workers were killed {restart} times in a row (out of memory?): reduce "
                        "data.num_workers, or use a machine with more memory"
                    ) from error
                log.warning("a data worker was killed (out of memory?): restarting all data workers")
                self._batches = self._start()
        raise AssertionError("unreachable")

    def _lost_a_worker(self, error: Exception) -> bool:
        """Return whether an error comes from the connection to a killed worker, not from the dataset.

        Raises:
            DataError: the limit of open files is too low.
        """
        if not self.num_workers or "in DataLoader worker process" in str(error):
            return False
        if "Too many open files" in str(error):
            raise DataError("data workers need more open files: raise the limit (ulimit -n)") from error
        # Its sockets are closed before it counts as dead, so reading from them may fail first.
        return "DataLoader worker" in str(error) or not isinstance(error, RuntimeError)

    def _start(self) -> Iterator[CollatedBatch | DataError]:
        loader = DataLoader(
            _Guarded(self.dataset),
            batch_sampler=BatchesOf(self.order),
            collate_fn=_collate,
            num_workers=self.num_workers,
            # A forked copy of a process with threads may hang.
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=_ignore_interrupts if self.num_workers else None,
            # Its own generator: otherwise the loader draws its seed from the generator of the noise.
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
        )
        before = signal.getsignal(signal.SIGCHLD)
        try:
            batches = iter(loader)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot start data workers: {reason}; lower data.num_workers") from error
        # When a worker dies, torch's handler raises at an arbitrary point of the program; here `__next__` detects it.
        if self.num_workers:
            signal.signal(signal.SIGCHLD, before)
        return batches


class _Guarded(Dataset[Sample | DataError]):
    """Returns a sample's error instead of raising it: a worker would wrap it in a traceback."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(samples: Sequence[Sample | DataError]) -> CollatedBatch | DataError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return DataError(str(sample))
        good.append(sample)
    try:
        return collate(good)
    except DataError as error:
        return error


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches all processes of a terminal: the run itself ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
