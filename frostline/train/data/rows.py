"""The rows of a dataset: of a metadata file, a list of prompts, or a folder of captioned videos."""

import io
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
REFERENCE = "reference"
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")
_PERMISSION = "allow_outside=True"
_PROMPTS = ".txt"
_BESIDE = ".reference"


@dataclass(frozen=True)
class Row:
    """A row with a prompt and usually a video, or the reason (field, text) why it is invalid.

    Attributes:
        number: the line in a csv, jsonl or txt file (a csv header is line 1), the position from 1 in a json list, or
            the video's position from 1 in a folder.
        video: None if the row has no video; `no_video` then states the reason.
        reference: files and folders with pictures of the subject, separate from the video.
    """

    number: int
    sample_id: str
    video: Path | None = None
    prompt: str = ""
    reference: tuple[Path, ...] = ()
    no_video: str = ""
    fault: tuple[str, str] | None = None


def resolve_source(source: Path) -> Path:
    """Return the metadata file, the list of prompts, or the folder of captioned videos for `source`.

    Raises:
        DataError: it is none of these, or a folder with several metadata files.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if not source.is_dir():
        if source.suffix.lower() not in _READERS:
            raise DataError(f"{source}: must be metadata (.csv, .jsonl or .json) or a list of prompts (.txt)")
        return source
    found = [source / name for name in METADATA_NAMES if (source / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{source}: contains {' and '.join(path.name for path in found)}; name the one to use")
    return found[0] if found else source


def read_rows(source: Path, allow_outside: bool) -> tuple[Row, ...]:
    """Read all rows of the result of `resolve_source`, each with a unique name.

    Args:
        allow_outside: let metadata name videos and references outside of the folder, and captions be links to such
            files.
    Raises:
        DataError: the source as a whole cannot be read. Problems of a row are stored in the row.
    """
    rows = _rows_of_folder(source, allow_outside) if source.is_dir() else _rows_of_metadata(source, allow_outside)
    return _with_unique_ids(rows)


def _rows_of_folder(folder: Path, allow_outside: bool) -> Iterator[Row]:
    """Return the videos under a folder, sorted by name, with their captions and references."""
    files = sorted(_files_under(folder))
    videos, references = _references_apart(folder, [path for path in files if path.suffix.lower() in MEDIA_SUFFIXES])
    others = Counter(path.suffix.lower() or path.name for path in files)
    for suffix in (*MEDIA_SUFFIXES, ".txt"):
        del others[suffix]
    if others:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logger.info("%s: skipped files whose suffix is not that of a video or picture: %s", folder, listed)
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
                reason = f"there is no caption file {caption.name} next to the video"
        sample_id = video.relative_to(folder).as_posix()
        beside = references.get(video.with_suffix(""), ())
        yield Row(number, sample_id, video, prompt, beside, fault=None if prompt else ("prompt", reason))


def _references_apart(folder: Path, media: list[Path]) -> tuple[list[Path], dict[Path, tuple[Path, ...]]]:
    """Return the samples of a folder, and the files `NAME.reference.SUFFIX` and folders `NAME.reference/` of samples
    named NAME.
    """
    names = {path.with_suffix("") for path in media}
    videos: list[Path] = []
    references: dict[Path, dict[Path, None]] = {}
    for path in media:
        within = [place for place in (path.with_suffix(""), *path.parents) if place.is_relative_to(folder)]
        owned = [(place.with_suffix(""), place) for place in within if place.suffix == _BESIDE]
        name, place = next(((name, place) for name, place in owned if name in names), (None, path))
        if name is None:
            videos.append(path)
        else:
            references.setdefault(name, {})[path if place == path.with_suffix("") else place] = None
    return videos, {name: tuple(files) for name, files in references.items()}


def _files_under(folder: Path) -> Iterator[Path]:
    """Return the files of a folder and its subfolders, including linked folders, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            logger.warning("%s: skipped, because it is a link to a folder that was already read", place)
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
    told = False
    for number, record in _READERS[file.suffix.lower()](file, text):
        if not told and isinstance(record, dict) and (meant := _meant_as_reference(record)) is not None:
            told = True
            logger.warning("%s: the column %r is not read: did you mean %r?", file, meant, REFERENCE)
        yield _parse_row(file.parent, number, record, allow_outside)


def _read_csv(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from csv_records(io.StringIO(text, newline=""))
    except DataError as error:
        raise DataError(f"{file}, {error}") from error


def _read_jsonl(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, row {number}: invalid JSON: {error}") from error


def _read_json(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: invalid JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: must be a list of objects with {' and '.join(COLUMNS)}")
    yield from enumerate(records, 1)


def _read_prompts(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"video": None, "prompt": line}


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json, _PROMPTS: _read_prompts}
"""Maps suffixes to functions from the file and its text to (row number, record) pairs."""


def _parse_row(folder: Path, number: int, record: Any, allow_outside: bool) -> Row:
    """Parse one record; problems are stored in the row."""
    sample_id = f"row-{number}"

    def bad(field: str, reason: str) -> Row:
        return Row(number, sample_id, fault=(field, reason))

    if not isinstance(record, dict):
        return bad("row", f"must be an object with {' and '.join(COLUMNS)}, not {type(record).__name__}")
    if isinstance(record.get("video"), str) and record["video"].strip():
        sample_id = record["video"].strip()
    if None in record:  # the key of csv.DictReader for values beyond the header
        return bad("row", "has more fields than the header; quote a prompt that contains commas")
    lacking, unusable = {}, {}
    for column in COLUMNS:
        if column not in record:
            near = nearest_name(column, [name for name in record if name not in COLUMNS])
            hint = f"did you mean '{near}'?" if near else f"found {', '.join(map(repr, record)) or 'nothing'}"
            (unusable if near else lacking)[column] = f"the column is missing; {hint}"
        elif not isinstance(record[column], str | None):
            unusable[column] = f"must be text, not {type(record[column]).__name__}"
        elif not (record[column] or "").strip():
            lacking[column] = "is empty"
    # A video may be missing, unless the prompt is missing too, as in a file without a header.
    for column in COLUMNS:
        if column in unusable or (column in lacking and "prompt" in (lacking | unusable)):
            return bad(column, (unusable | lacking)[column])
    no_video = lacking.get("video", "")
    if not is_text(record["prompt"]):
        return bad("prompt", "contains half of a character (a lone surrogate)")
    try:
        video = None if no_video else _path(folder, record["video"], allow_outside)
    except DataError as error:
        return bad("video", str(error))
    try:
        reference = tuple(_path(folder, name, allow_outside) for name in _reference_names(record.get(REFERENCE)))
    except DataError as error:
        return bad(REFERENCE, str(error))
    return Row(number, sample_id, video, record["prompt"].strip(), reference, no_video)


def _path(folder: Path, name: str, allow_outside: bool) -> Path:
    """Return the path that a file in `folder` names."""
    check_inside(folder, name.strip(), _PERMISSION, allow_outside)
    return Path(os.path.normpath((folder / name.strip()).absolute()))


def _reference_names(value: Any) -> list[str]:
    """Return the entries of the column: one path, in JSON also a list of paths, or none."""
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"must be text or a list of texts, not {type(name).__name__}")
    if isinstance(value, list) and not all(name.strip() for name in names):
        raise DataError("a name in the list is empty")
    return [name for name in names if name.strip()]


def _meant_as_reference(record: dict[Any, Any]) -> str | None:
    """Return a column that is not read, but whose name is similar to `reference`; None if there is no such column."""
    if REFERENCE in record:
        return None
    names = [name for name in record if isinstance(name, str) and name not in COLUMNS]
    near = nearest_name(REFERENCE, names)
    return near if near is not None and near.strip().lower().startswith(REFERENCE[:3]) else None


def _with_unique_ids(rows: Iterator[Row]) -> tuple[Row, ...]:
    """Return the rows with `#row` appended to names that are not unique."""
    listed = tuple(rows)
    counts = Counter(row.sample_id for row in listed)
    return tuple(
        row if counts[row.sample_id] == 1 else replace(row, sample_id=f"{row.sample_id}#{row.number}") for row in listed
    )
