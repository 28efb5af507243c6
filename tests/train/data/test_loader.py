"""Data workers: replaced when they are killed, in the same order, with a clear error for a broken video."""

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from frostline.errors import DataError
from frostline.train.data import dataset as data_module
from frostline.train.data.data_order import DataOrder
from frostline.train.data.dataset import Sample
from frostline.train.data.loader import Batches


class Numbers(Dataset[Sample]):
    """A dataset whose sample i has the id i. `fatal` kills its reader `deaths` times; `broken` cannot be read."""

    def __init__(
        self,
        folder: Path,
        fatal: int | None = None,
        deaths: int = 1,
        broken: int | None = None,
        error: type = DataError,
    ) -> None:
        self.folder, self.fatal, self.deaths, self.broken, self.error = folder, fatal, deaths, broken, error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise self.error(f"sample {index}, field 'video': is broken")
        if index == self.fatal:
            died = len(list(self.folder.iterdir()))
            if died < self.deaths:
                (self.folder / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        sample: Sample = {"sample_id": str(index), "prompt": "", "video": torch.zeros(1, 3, 16, 16)}
        return {**sample, "notes": ("clip 3 is short",)} if index == 3 else sample


def names(dataset: Numbers, workers: int, count: int) -> list[Any]:
    batches = Batches(dataset, DataOrder(6, 2, seed=0), workers)
    try:
        return [batch["sample_id"] for batch in islice(batches, count)]
    finally:
        batches.close()


def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    expected = names(Numbers(tmp_path), 0, 5)
    assert names(Numbers(tmp_path, fatal=3), 1, 5) == expected
    assert "a data worker was killed" in caplog.text
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_named_without_a_traceback(workers: int, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        names(Numbers(tmp_path, broken=3), workers, 5)
    assert str(caught.value) == "sample 3, field 'video': is broken"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_has_to_tell_is_told_once(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_module._log_once.cache_clear()
    names(Numbers(tmp_path), workers, 9)
    assert [record.getMessage() for record in caplog.records] == ["clip 3 is short"]


def test_loading_does_not_touch_the_random_numbers_of_the_noise(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    names(Numbers(tmp_path), 0, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_worker_killed_from_outside_is_replaced_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kill a worker while it waits and while it sends: each batch still comes once and in order."""
    expected = names(Numbers(tmp_path), 0, 8)
    batches = Batches(Numbers(tmp_path), DataOrder(6, 2, seed=0), 2)
    try:
        found = []
        for number in range(8):
            if number in (1, 5):
                workers: Any = batches._batches
                os.kill(workers._workers[number % 2].pid, signal.SIGKILL)
            found.append(next(batches)["sample_id"])
    finally:
        batches.close()
    assert found == expected
    assert "a data worker was killed" in caplog.text


class Severed(Iterator[Any]):
    """The batches of a loader, followed by the error of a broken connection."""

    def __init__(self, batches: Iterator[Any], error: Exception, after: int) -> None:
        self.batches, self.error, self.left = batches, error, after

    def __next__(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return next(self.batches)


LOST = [
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError(2, "No such file or directory"),
    EOFError(),
    UnpicklingError("pickle data was truncated"),
    RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly"),
]


def severed(
    tmp_path: Path, error: Exception, times: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Return the ids of five batches through a connection that breaks `times` times; no real process is used."""
    start, left = Batches._start, iter(range(times))

    def breaking(batches: Batches) -> Any:
        batches.num_workers = 0
        whole = start(batches)
        batches.num_workers = workers
        return whole if next(left, None) is None else Severed(whole, error, after=2 if times == 1 else 0)

    monkeypatch.setattr(Batches, "_start", breaking)
    return names(Numbers(tmp_path), workers, 5)


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_way_that_breaks_with_its_worker_is_made_anew(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = names(Numbers(tmp_path), 0, 5)
    with monkeypatch.context() as patch:
        assert severed(tmp_path, error, 1, 1, patch) == expected
    with monkeypatch.context() as patch, pytest.raises(DataError, match="data workers were killed 4 times in a row"):
        severed(tmp_path, error, 9, 1, patch)
    # Without workers, there is no connection, so the error is raised.
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        severed(tmp_path, error, 1, 0, patch)


def test_too_many_open_files_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("Too many open files. Communication with …"), OSError(24, "Too many open files")):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=r"more open files: raise the limit"):
            severed(tmp_path, error, 1, 1, patch)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_an_error_of_the_data_set_is_no_killed_worker(
    error: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(error, match=r"sample 3, field 'video': is broken"):
        names(Numbers(tmp_path, broken=3, error=error), 1, 5)
    assert "a data worker was killed" not in caplog.text
