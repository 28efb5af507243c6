"""The rows of a dataset: of a metadata file, or the captioned videos of a folder."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frostline.csvfile import csv_records
from frostline.errors import DataError
from frostline.escaping import is_text
from frostline.paths import check_inside, open_regular
from frostline.train.data.batch import nearest_name
from frostline.video import MEDIA_SUFFIXES

logger = logging.getLogger(__name__)

COLUMNS = ("video", "prompt")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")
_PERMISSION = "allow_outside=True"


@dataclass(frozen=True)
class Row:
    """A row that names a video and a prompt, or the fault (field, reason) that keeps it from doing so.

    number: the line in a csv or jsonl file (a csv header is line 1), the item's place from 1 in a json list, or the
    video's place from 1 in a folder.
    """

    number: int
    sample_id: str
    video: Path = Path()
    prompt: str = ""
    fault: tuple[str, str] | None = None


def resolve_source(source: Path) -> Path:
    """Return the metadata file, or the folder of captioned videos, that `source` means.

    Raises:
        DataError: it is neither, or a folder with several metadata files.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if not source.is_dir():
        if source.suffix.lower() not in _READERS:
            raise DataError(f"{source}: metadata must be a .csv, .jsonl or .json file")
        return source
    found = [source / name for name in METADATA_NAMES if (source / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{source}: holds {' and '.join(path.name for path in found)}; name the one to use")
    return found[0] if found else source


def read_rows(source: Path, allow_outside: bool) -> tuple[Row, ...]:
    """Read all rows of what `resolve_source` returned, each with a name of its own.

    Args:
        allow_outside: let metadata name videos, and captions be links to files, outside of the folder.
    Raises:
        DataError: the source as a whole cannot be read. What is wrong with a row is its fault.
    """
    rows = _rows_of_folder(source, allow_outside) if source.is_dir() else _rows_of_metadata(source, allow_outside)
    return _with_unique_ids(rows)


def _rows_of_folder(folder: Path, allow_outside: bool) -> Iterator[Row]:
    """The videos under a folder in the order of their names, with the captions beside them."""
    files = sorted(_files_under(folder))
    videos = [path for path in files if path.suffix.lower() in MEDIA_SUFFIXES]
    others = Counter(path.suffix.lower() or path.name for path in files)
    for suffix in (*MEDIA_SUFFIXES, ".txt"):
        del others[suffix]
    if others:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logger.info("%s: files that are no videos or pictures by their names are left out: %s", folder, listed)
    for number, video in enumerate(videos, 1):
        caption = video.with_suffix(".txt")
        prompt, reason = "", f"the caption {caption.name} is empty"
        try:
            if not allow_outside and not caption.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"it leads outside of {folder}; {_PERMISSION} permits that for a folder you trust")
            with open_regular(caption) as file:
                prompt = file.read().decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError, DataError) as error:
            reason = f"the caption {caption.name} cannot be read: {error}"
            if not os.path.lexists(caption):
                reason = f"no caption file {caption.name} beside the video"
        sample_id = video.relative_to(folder).as_posix()
        yield Row(number, sample_id, video, prompt, fault=None if prompt else ("prompt", reason))


def _files_under(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those below it, links to folders included; nothing that is hidden."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            logger.warning("%s: left out: a link leads there, and it was read before", place)
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in names if not name.startswith("."))


def _rows_of_metadata(file: Path, allow_outside: bool) -> Iterator[Row]:
    try:
        with open_regular(file) as opened:
            text = opened.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{file}: is empty")
    for number, record in _READERS[file.suffix.lower()](file, text):
        yield _parse_row(file.parent, number, record, allow_outside)


def _read_csv(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from csv_records(text)
    except DataError as error:
        raise DataError(f"{file}, {error}") from error


def _read_jsonl(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, row {number}: is not well-formed JSON: {error}") from error


def _read_json(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not well-formed JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: must be a list of objects with {' and '.join(COLUMNS)}")
    yield from enumerate(records, 1)


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
"""By suffix: a function from the file and its text to (row number, record) pairs."""


def _parse_row(folder: Path, number: int, record: Any, allow_outside: bool) -> Row:
    """One record as a row; whatever is wrong with it becomes the row's fault."""
    sample_id = f"row-{number}"

    def bad(field: str, reason: str) -> Row:
        return Row(number, sample_id, fault=(field, reason))

    if not isinstance(record, dict):
        return bad("row", f"must be an object with {' and '.join(COLUMNS)}, not {type(record).__name__}")
    if isinstance(record.get("video"), str) and record["video"].strip():
        sample_id = record["video"].strip()
    if None in record:  # where csv.DictReader puts what is beyond the header
        return bad("row", "has more fields than the header; quote a prompt that holds commas")
    for column in COLUMNS:
        if column not in record:
            near = nearest_name(column, [name for name in record if name not in COLUMNS])
            hint = f"is '{near}' meant?" if near else f"found {', '.join(map(repr, record)) or 'nothing'}"
            return bad(column, f"the column is missing; {hint}")
        value = record[column]
        if value is not None and not isinstance(value, str):
            return bad(column, f"must be text, not {type(value).__name__}")
        if not (value or "").strip():
            return bad(column, "is empty")
    if not is_text(record["prompt"]):
        return bad("prompt", "holds half of a character (a lone surrogate)")
    video = record["video"].strip()
    try:
        check_inside(folder, video, _PERMISSION, allow_outside)
    except DataError as error:
        return bad("video", str(error))
    return Row(number, sample_id, Path(os.path.normpath((folder / video).absolute())), record["prompt"].strip())


def _with_unique_ids(rows: Iterator[Row]) -> tuple[Row, ...]:
    """Rows with `#row` added to the names that several of them share."""
    listed = tuple(rows)
    counts = Counter(row.sample_id for row in listed)
    return tuple(
        row if counts[row.sample_id] == 1 else replace(row, sample_id=f"{row.sample_id}#{row.number}") for row in listed
    )
