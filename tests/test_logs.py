"""The log file contains all messages of frostline from the start, whatever the console shows."""

import logging
import os
import re
from pathlib import Path

import pytest

from frostline.errors import DataError
from frostline.terminal.logs import LogFile, logged_to_file

log = logging.getLogger("frostline.test_logs")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) +(frostline[\w.]*): (.*)")


def read(path: Path) -> list[tuple[str, str]]:
    found = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    return [(line[1], line[3]) for line in found if (line and "test_logs" in line[2]) or (line and line[1] == "ERROR")]


def test_messages_from_before_the_file_are_in_it_and_later_runs_append(tmp_path: Path) -> None:
    path = tmp_path / "frostline.log"
    for number in (1, 2):
        with logged_to_file() as file:
            log.debug("early %d", number)
            assert path.exists() == (number == 2), "nothing is written before the file is named"
            file.open(path)
            log.warning("late \x1b[2J %d", number)
        log.warning("after the end")
    assert read(path) == [
        ("DEBUG", "early 1"),
        ("WARNING", r"late \x1b[2J 1"),
        ("DEBUG", "early 2"),
        ("WARNING", r"late \x1b[2J 2"),
    ]
    assert "command: " in path.read_text()


def test_the_error_that_ends_a_run_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "frostline.log"
    with pytest.raises(DataError), logged_to_file() as file:
        file.open(path)
        raise DataError("row 3: no video")
    assert read(path) == [("ERROR", "row 3: no video")]
    assert "Traceback" in path.read_text()


def test_a_run_that_is_refused_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError), logged_to_file():
        raise DataError("no")
    assert [*tmp_path.iterdir()] == []


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with logged_to_file(active=False) as file:
        log.warning("of another process")
        assert isinstance(file, LogFile)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with logged_to_file() as file:
        file.open(Path("/dev/full"))
        log.warning("one")
        log.warning("two")
    given_up = [record.message for record in caplog.records if "cannot write the log file" in record.message]
    assert len(given_up) == 1 and os.strerror(28) in given_up[0]
