"""Files of results: rows are appended whole, so that the file is valid at every moment, and read back to go on.

What a process that was stopped had half written is dropped: whatever follows the last line's end. A name that is no
UTF-8 is escaped in JSON, which could not hold it otherwise, and its own bytes in CSV.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from frostline.atomic_io import atomic_write
from frostline.errors import ConfigError, DataError
from frostline.score.result import COLUMNS, VideoScore

SUFFIXES = (".jsonl", ".csv")


class ResultFile:
    """A `.jsonl` or `.csv` file of `VideoScore` rows.

    Raises:
        ConfigError: the name ends in neither.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: results are written as {' or '.join(SUFFIXES)}")
        self.path = path

    def read(self) -> list[VideoScore]:
        """The rows that are there, of a file that is missing none.

        Raises:
            DataError: a line is not a row of results; names it.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
        first = 1 if self.path.suffix == ".csv" else 0
        if first and lines and lines[0] != _header():
            raise DataError(f"{self.path}: its first line is not the header of results")
        return [self._parse(line, number) for number, line in enumerate(lines[first:], first + 1)]

    def rewrite(self, rows: Iterable[VideoScore]) -> None:
        """Put a file of these rows in the place of whatever is there."""
        with atomic_write(self.path) as part:
            lines = "".join([*self._head(), *map(self._line, rows)])
            part.write_text(lines, encoding="utf-8", errors="surrogateescape", newline="")

    def append(self, row: VideoScore) -> None:
        """Add one row, in one call of the operating system."""
        data = self._line(row).encode(errors="surrogateescape")
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _head(self) -> list[str]:
        return [f"{_header()}\n"] if self.path.suffix == ".csv" else []

    def _line(self, row: VideoScore) -> str:
        if self.path.suffix == ".jsonl":
            return f"{row.json_line()}\n"
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(row.cells())
        return buffer.getvalue()

    def _parse(self, line: str, number: int) -> VideoScore:
        try:
            if self.path.suffix == ".jsonl":
                return VideoScore.of_json_line(line)
            (cells,) = csv.reader([line], strict=True)
            return VideoScore.of_cells(dict(zip(COLUMNS, cells, strict=True)))
        except (ValidationError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{self.path}, line {number}: is not a row of results ({_first_line(error)})") from error


def _header() -> str:
    return ",".join(COLUMNS)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
