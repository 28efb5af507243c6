"""Data workers: started afresh, in the same order whatever happens to them, and heard when a video is broken."""

import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from frostline.errors import DataError
from frostline.train import data as data_module
from frostline.train.data import Sample
from frostline.train.loader import Batches
from frostline.train.order import DataOrder


class Numbers(Dataset[Sample]):
    """Sample i is named i; `fatal` kills its reader so many times, `broken` cannot be read."""

    def __init__(self, folder: Path, fatal: int | None = None, deaths: int = 1, broken: int | None = None) -> None:
        self.folder, self.fatal, self.deaths, self.broken = folder, fatal, deaths, broken

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError(f"sample {index}, field 'video': is broken")
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
