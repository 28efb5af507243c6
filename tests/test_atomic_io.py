"""Atomic writes: the mode of the file, and what is left after a failure."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frostline.atomic_io import atomic_write
from frostline.errors import DataError


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_decides_the_mode(umask: int, tmp_path: Path) -> None:
    """Check it also for safetensors, which replaces the file by one that only its owner can read."""
    with atomic_write(tmp_path / "new" / "tensors.safetensors") as part:
        save_file({"weight": torch.zeros(2)}, part)
    with atomic_write(tmp_path / "text.json") as part:
        part.write_text("{}")
    (tmp_path / "text.json").chmod(0o400)
    with atomic_write(tmp_path / "text.json") as part:
        part.write_text("[]")
    assert mode(tmp_path / "new" / "tensors.safetensors") == mode(tmp_path / "text.json") == 0o666 & ~umask


def test_a_file_system_without_modes_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    with atomic_write(tmp_path / "text.json") as part:
        part.write_text("{}")
    assert (tmp_path / "text.json").read_text() == "{}"


def test_a_failure_leaves_the_file_of_before_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "text.json") as part:
        part.write_text("[")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]
    assert (tmp_path / "text.json").read_text() == "{}"


def test_where_it_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"file/x\.json: cannot be written"),
        atomic_write(tmp_path / "file" / "x.json"),
    ):
        pass
