"""Read and write results files. Rows are appended one by one, so that an interrupted run can be resumed.

An incomplete last line, without a newline, is ignored. Names that are not valid UTF-8 are escaped in JSON, and written
as the original bytes in CSV.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from frostline.atomic_io import atomic_write
from frostline.errors import ConfigError, DataError
from frostline.score.result import FIELDS, VideoScore, columns

SUFFIXES = (".jsonl", ".csv")


class ResultFile:
    """A `.jsonl` or `.csv` file of `VideoScore` rows.

    Args:
        path: the file, which need not exist.
        labels: the labels of the rewards except `face_identity`. Each is a column, followed by the columns of its
            metrics (`label_…`) if any row has them.
        faces: whether `face_identity` is one of the rewards; adds its columns.
    Raises:
        ConfigError: the name has another suffix.
    """

    def __init__(self, path: Path, labels: Sequence[str] = (), faces: bool = True) -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: the name of the results file must end in {' or '.join(SUFFIXES)}")
        self.path = path
        self.labels = tuple(labels)
        self.faces = faces
        self._scores = self.labels

    def read(self) -> list[VideoScore]:
        """Return all rows; an empty list if the file does not exist.

        Raises:
            DataError: the file cannot be read, or a line is not a valid row.
        """
        rows = list(self.stream())
        self._take_scores(rows)
        return rows

    def stream(self) -> Iterator[VideoScore]:
        """Yield the rows one by one; yields nothing if the file does not exist.

        Raises:
            DataError: the file cannot be read, or a line is not a valid row.
        """
        is_csv = self.path.suffix == ".csv"
        try:
            with self.path.open(encoding="utf-8", errors="surrogateescape") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith("\n"):
                        return
                    if is_csv and number == 1:
                        self._take_header(line[:-1])
                    else:
                        yield self._parse(line[:-1], number)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def rewrite(self, rows: Sequence[VideoScore]) -> None:
        """Replace the file by one with these rows. Iterates over the rows twice.

        Raises:
            DataError: the file cannot be written.
        """
        self._take_scores(rows)
        with (
            atomic_write(self.path) as part,
            part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            file.writelines(self._head())
            file.writelines(map(self._line, rows))

    def append(self, row: VideoScore) -> None:
        """Append one row to the file, which must exist. A CSV file that lacks one of the row's columns is rewritten.

        Raises:
            DataError: the file cannot be written.
        """
        if self._take_scores([row]) and self.path.suffix == ".csv":
            self.rewrite([*self.read(), row])
            return
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

    def _take_scores(self, rows: Iterable[VideoScore]) -> bool:
        """Add columns for all scores of `rows`; return whether any column is new."""
        new = {name for row in rows for name in row.scores} - {*self._scores}
        # Metrics follow the score of their reward. `sorted` is stable, so the order of rewards is preserved.
        self._scores = tuple(sorted((*self._scores, *sorted(new)), key=self._place))
        return bool(new)

    def _place(self, score: str) -> tuple[int, bool]:
        owner = self._owner(score)
        return self.labels.index(owner), score != owner

    def _owner(self, score: str) -> str:
        """Return the label of the reward that a score column belongs to.

        Raises:
            ValueError: it does not belong to any reward.
        """
        owners = [label for label in self.labels if score == label or score.startswith(f"{label}_")]
        if not owners:
            raise ValueError(f"{score} is not a column of these results")
        return max(owners, key=len)

    def _take_header(self, line: str) -> None:
        try:
            (names,) = csv.reader([line], strict=True)
            self._scores = tuple(name for name in names if name not in FIELDS)
            self._scores = tuple(sorted(self._scores, key=self._place))
            known = tuple(names) == self._columns and {*self.labels} <= {*self._scores}
        except (ValueError, csv.Error):
            known = False
        if not known:
            raise DataError(
                f"{self.path}: the first line is not the header of a results file with these rewards: use "
                "--overwrite to replace the file"
            )

    @property
    def _columns(self) -> tuple[str, ...]:
        return columns(self._scores, self.faces)

    def _head(self) -> list[str]:
        return [f"{_csv_line(self._columns)}\n"] if self.path.suffix == ".csv" else []

    def _line(self, row: VideoScore) -> str:
        if self.path.suffix == ".jsonl":
            return f"{row.json_line(self._columns)}\n"
        return f"{_csv_line(row.cells(self._columns))}\n"

    def _parse(self, line: str, number: int) -> VideoScore:
        try:
            if self.path.suffix == ".jsonl":
                row = VideoScore.of_json_line(line)
            else:
                (cells,) = csv.reader([line], strict=True)
                row = VideoScore.of_cells(dict(zip(self._columns, cells, strict=True)))
            for name in row.scores:
                self._owner(name)
            return row
        except (ValidationError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(
                f"{self.path}, line {number}: is not a valid row of results ({_first_line(error)})"
            ) from error


def _csv_line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
