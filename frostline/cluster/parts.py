"""Store results in a folder of small files as they arrive, in any order, and read them in the order of the input."""

from __future__ import annotations

import heapq
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from frostline.cluster.file_systems import file_system_of
from frostline.cluster.streamed_rows import StreamedRows
from frostline.errors import DataError
from frostline.score.result import VideoScore

_ROWS, _SECONDS = 512, 10.0
_UNREADABLE = "cannot be read: {}; use --overwrite to start over"
_SCHEMA = pa.schema([("index", pa.int64()), ("row", pa.string())])


@contextmanager
def _errors_of(path: str, message: str) -> Iterator[None]:
    """Raise errors of the file system and of Parquet as a DataError that names the path."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {message.format(error)}") from error


class ResultParts(StreamedRows):
    """Store the rows of an unfinished run. Files are written atomically; duplicate rows of an index are skipped.

    If the process is killed, the rows that were added since the last file are lost, and have to be scored again.

    Args:
        folder: a path or URL, which need not exist.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._system, self._path = file_system_of(folder)
        self._waiting: list[tuple[int, str]] = []
        self._written = time.monotonic()

    def add(self, row: VideoScore) -> None:
        """Add a row; write a file if 512 rows wait, or if the last file was written more than ten seconds ago.

        Raises:
            DataError: the file cannot be written.
        """
        # Stored as JSON, because rows can have different scores.
        self._waiting.append((row.index, json.dumps(row.model_dump(mode="json"), separators=(",", ":"))))
        if len(self._waiting) >= _ROWS or time.monotonic() > self._written + _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were added since the last file.

        Raises:
            DataError: the file cannot be written.
        """
        self._written, self._count = time.monotonic(), None
        if not self._waiting:
            return
        columns = [pa.array(column) for column in zip(*sorted(self._waiting), strict=True)]
        name = f"{self._path}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        with _errors_of(self.folder, "cannot be written: {}"):
            self._system.create_dir(self._path, recursive=True)
            pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), f"{name}.tmp", filesystem=self._system)
            self._system.move(f"{name}.tmp", f"{name}.parquet")
        self._waiting = []

    def delete(self) -> None:
        """Delete the folder, if it exists.

        Raises:
            DataError: it cannot be deleted.
        """
        self._waiting, self._count = [], None
        with _errors_of(self.folder, "cannot be deleted: {}"):
            if self._system.get_file_info(self._path).type != fs.FileType.NotFound:
                self._system.delete_dir(self._path)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the index and JSON of each written row, sorted by index. Only files with overlapping indices are open.

        Raises:
            DataError: a file cannot be read.
        """
        pending = sorted((self._first(path), path) for path in self._parts())
        open_parts: list[tuple[int, str, str, Iterator[tuple[int, str]]]] = []
        last = -1
        while pending or open_parts:
            while pending and (not open_parts or pending[0][0] <= open_parts[0][0]):
                path = pending.pop(0)[1]
                self._advance(open_parts, path, self._read(path))
            index, line, path, rest = heapq.heappop(open_parts)
            self._advance(open_parts, path, rest)
            if index > last:
                yield index, line
            last = index

    def __iter__(self) -> Iterator[VideoScore]:
        return (VideoScore.model_validate(json.loads(line)) for _, line in self.lines())

    def count_rows(self) -> int:
        """Count the written rows without parsing them."""
        return sum(1 for _ in self.lines())

    def _parts(self) -> list[str]:
        with _errors_of(self.folder, _UNREADABLE):
            found = self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return [info.path for info in found if info.path.endswith(".parquet")]

    def _first(self, path: str) -> int:
        with _errors_of(path, _UNREADABLE), pq.ParquetFile(self._system.open_input_file(path)) as part:
            return part.metadata.row_group(0).column(0).statistics.min

    def _read(self, path: str) -> Iterator[tuple[int, str]]:
        with _errors_of(path, _UNREADABLE):
            table = pq.read_table(path, filesystem=self._system)
        return zip(table["index"].to_pylist(), table["row"].to_pylist(), strict=True)

    @staticmethod
    def _advance(
        open_parts: list[tuple[int, str, str, Iterator[tuple[int, str]]]], path: str, rest: Iterator[tuple[int, str]]
    ) -> None:
        if (line := next(rest, None)) is not None:
            heapq.heappush(open_parts, (*line, path, rest))
