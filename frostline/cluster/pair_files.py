"""Read files of pairs (CSV, JSON Lines or Parquet) of any size row by row, from any file system of pyarrow."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from frostline.cluster.file_systems import file_system_of
from frostline.documents import parse_json
from frostline.errors import ConfigError, DocumentError
from frostline.paths import is_url
from frostline.rewards.inputs import Need
from frostline.score.request import Pair, check_columns, pair_of_row, pairs_of_arguments, rows_of_csv

_CELLS = ("video", "reference", "prompt")
_ROWS = 1024


@dataclass(frozen=True)
class PairSource:
    """Iterate over the pairs to score: the videos of the command line, or the rows of a file.

    The file is read again at each iteration. The attributes are the arguments of `gather_pairs`, but `file` may also be
    a URL; it must end in `.csv`, `.jsonl` or `.parquet`.
    """

    videos: tuple[str, ...] = ()
    reference: str | None = None
    file: str | None = None
    allow_outside: bool = False
    prompt: str | None = None
    needs: frozenset[Need] = frozenset({"reference"})

    def check(self) -> int:
        """Check the input, and return the number of pairs.

        Raises:
            ConfigError: there are no pairs, both videos and a file were given, the file is missing or invalid, or an
                input that the rewards need is missing.
        """
        if self.file is not None and self.videos:
            raise ConfigError("videos and --pairs exclude each other: use only one of them")
        count, prompts = 0, False
        for pair in self:
            count += 1
            prompts = prompts or bool(pair.prompt)
        if not count:
            raise ConfigError(f"{self.file}: contains no rows")
        if "prompt" in self.needs and not prompts:
            raise ConfigError(
                "the rewards need prompts, but none were given: set --prompt for all videos, or add a column 'prompt' "
                "to the file of --pairs"
            )
        return count

    def __iter__(self) -> Iterator[Pair]:
        if self.file is None:
            yield from pairs_of_arguments(self.videos, self.reference, self.prompt, self.needs)
            return
        default = Pair(0, "", self.reference or "", self.prompt or "")
        folder = posixpath.dirname(self.file) if is_url(self.file) else Path(self.file).parent
        for index, row in enumerate(_rows(self.file)):
            yield pair_of_row(index, row, folder, default, self.allow_outside, self.needs)


def _rows(file: str) -> Iterator[Mapping[str | None, Any]]:
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    read = readers.get(posixpath.splitext(file)[1].lower())
    if read is None:
        raise ConfigError(f"{file}: unsupported file type for pairs: use one of {', '.join(readers)}")
    system, path = file_system_of(file)
    try:
        with system.open_input_file(path) as stream:
            yield from read(stream, file)
    except FileNotFoundError:
        raise ConfigError(f"no such file of pairs: {file}") from None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def _csv(stream: Any, file: str) -> Iterable[Mapping[str | None, Any]]:
    return rows_of_csv(_lines(stream, newline=""), file)


def _json_lines(stream: Any, file: str) -> Iterator[Mapping[str | None, Any]]:
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except DocumentError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {number}: must be an object with a key 'video'")
        check_columns([*row], f"{file}, line {number}")
        yield {name: _cell(row.get(name), f"{file}, line {number}: {name}") for name in _CELLS}


def _parquet(stream: Any, file: str) -> Iterator[Mapping[str | None, Any]]:
    with pq.ParquetFile(stream) as table:
        check_columns(table.schema_arrow.names, file)
        names = [name for name in _CELLS if name in table.schema_arrow.names]
        place = 0
        for batch in table.iter_batches(_ROWS, columns=names):
            for row in batch.to_pylist():
                yield {name: _cell(value, f"{file}, row {place}: {name}") for name, value in row.items()}
                place += 1


def _lines(stream: Any, newline: str | None = None) -> Iterable[str]:
    # File names need not be valid UTF-8.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _cell(value: object, place: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ConfigError(f"{place}: must be text, not {value!r}")
