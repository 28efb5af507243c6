"""Convert results to Arrow tables and Parquet files, with the same columns as CSV files, but typed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from frostline.atomic_io import atomic_write
from frostline.errors import DataError
from frostline.score.result import FIELDS, Landmarks, VideoScore, columns

_ROWS = 1024
_NUMBERS = pa.list_(pa.float64())
_TYPES: Mapping[Any, pa.DataType] = {
    str: pa.string(),
    Literal["ok", "error"]: pa.string(),
    int: pa.int64(),
    int | None: pa.int64(),
    float | None: pa.float64(),
    tuple[float, ...] | None: _NUMBERS,
    tuple[float | None, ...] | None: _NUMBERS,
    Landmarks | None: pa.list_(_NUMBERS),
    tuple[int, ...] | None: pa.list_(pa.int64()),
}


def schema_of(names: Sequence[str]) -> pa.Schema:
    """Return the schema of a results table; columns that are not fields of `VideoScore` are scores (float64)."""
    fields = VideoScore.model_fields
    return pa.schema([(name, _TYPES[fields[name].annotation] if name in FIELDS else pa.float64()) for name in names])


def table_of(rows: Iterable[VideoScore], names: Sequence[str]) -> pa.Table:
    """Return rows as a table with these columns; bytes that are not valid UTF-8 are written as `\\udcXX`."""
    plain = [{name: _text(value) for name, value in row.plain(names).items()} for row in rows]
    return pa.Table.from_pylist(plain, schema_of(names))


def rows_of(table: pa.Table | pa.RecordBatch) -> Iterator[VideoScore]:
    """Yield the rows of a results table.

    Raises:
        ValueError: a row is not a valid result.
    """
    for values in table.to_pylist():
        fields = {name: value for name, value in values.items() if name in FIELDS}
        scores = {name: value for name, value in values.items() if name not in FIELDS and value is not None}
        yield VideoScore.model_validate({**fields, "scores": scores})


class ParquetFile:
    """Read and write a Parquet file of results, with the methods `stream` and `rewrite` of `ResultFile`.

    Args:
        path: the file, which need not exist.
        labels: the labels of the rewards except `face_identity`.
        faces: whether `face_identity` is one of the rewards.
    """

    def __init__(self, path: Path, labels: Sequence[str], faces: bool) -> None:
        self.path = path
        self._labels = tuple(labels)
        self._faces = faces

    def stream(self) -> Iterator[VideoScore]:
        """Yield the rows one by one; yields nothing if the file does not exist.

        Raises:
            DataError: the file cannot be read, or is not a results file.
        """
        if not self.path.exists():
            return
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS):
                    yield from rows_of(batch)
        except (OSError, pa.ArrowException, ValidationError) as error:
            raise DataError(f"{self.path}: is not a valid Parquet file of results: {error}") from error

    def rewrite(self, rows: Sequence[VideoScore]) -> None:
        """Replace the file by one with these rows. Iterates over the rows twice.

        Raises:
            DataError: the file cannot be written.
        """
        scores = dict.fromkeys(self._labels)
        for row in rows:
            scores |= dict.fromkeys(row.scores)
        names = columns(sorted(scores, key=self._place), self._faces)
        with atomic_write(self.path) as part, pq.ParquetWriter(part, schema_of(names)) as writer:
            block: list[VideoScore] = []
            for row in rows:
                block.append(row)
                if len(block) == _ROWS:
                    writer.write_table(table_of(block, names))
                    block = []
            writer.write_table(table_of(block, names))

    def _place(self, score: str) -> tuple[int, bool, str]:
        """Return a sort key: rewards keep their order, and metrics follow the score of their reward."""
        owners = [index for index, label in enumerate(self._labels) if f"{score}_".startswith(f"{label}_")]
        owner = max(owners, key=lambda index: len(self._labels[index]), default=len(self._labels))
        return owner, score not in self._labels, score


def _text(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
