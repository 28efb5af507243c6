"""Notes: a note is read only if this user wrote it under this name."""

import os
from pathlib import Path

import pytest

from frostline.runtime.user_cache import recall, remember


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "one.sha256"


def test_what_was_noted_is_recalled(note: Path) -> None:
    assert recall(note) is None
    remember(note, "text\nof two lines")
    assert recall(note) == "text\nof two lines"
    remember(note, "another")
    assert recall(note) == "another"


def test_what_was_altered_moved_or_unsigned_is_not(note: Path, signing_key: Path) -> None:
    remember(note, "0" * 64)
    written = note.read_bytes()
    for position in range(len(written) - 1):
        note.write_bytes(bytes([*written[:position], written[position] ^ 1, *written[position + 1 :]]))
        assert recall(note) is None, position
    for content in (b"0" * 64, b"", b"\xff\n", written[:40]):
        note.write_bytes(content)
        assert recall(note) is None
    for other in (note.with_name("two.sha256"), note.parents[1] / "latency" / note.name):
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(written)
        assert recall(other) is None
    note.write_bytes(written)
    assert recall(note) == "0" * 64
    signing_key.unlink()
    assert recall(note) is None


def test_the_first_of_several_processes_decides_where_it_is_to(note: Path) -> None:
    remember(note, "first", keep=True)
    remember(note, "second", keep=True)
    assert recall(note) == "first"
    assert [file.name for file in note.parent.iterdir()] == [note.name]


def test_a_pipe_is_no_note(note: Path) -> None:
    note.parent.mkdir()
    os.mkfifo(note)
    assert recall(note) is None
    remember(note, "text")
    assert recall(note) == "text"


def test_without_a_key_nothing_is_noted(note: Path, signing_key: Path) -> None:
    remember(note, "text")
    signing_key.chmod(0o644)
    assert recall(note) is None
    remember(note, "other")
    signing_key.chmod(0o600)
    assert recall(note) == "text"
