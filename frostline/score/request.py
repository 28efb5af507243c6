"""Collect the pairs of a video and a reference to score, from the command line or from a CSV file."""

from __future__ import annotations

import difflib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.csvfile import csv_records
from frostline.errors import ConfigError, DataError
from frostline.escaping import text_of_csv_cell
from frostline.paths import check_inside, joined
from frostline.rewards.inputs import COMPARES, Need


@dataclass(frozen=True)
class Pair:
    """One video to score.

    Attributes:
        index: the position in the input, from 0.
        video: a path or URL.
        reference: a path or URL; empty if there is none.
        prompt: the text prompt; empty if there is none.
        fault: the reason if the video cannot be scored; otherwise empty.
    """

    index: int
    video: str
    reference: str
    prompt: str = ""
    fault: str = ""


def gather_pairs(
    videos: Sequence[str],
    reference: str | None,
    file: Path | None,
    allow_outside: bool = False,
    prompt: str | None = None,
    needs: Collection[Need] = ("reference",),
) -> list[Pair]:
    """Return the pairs of the command line, or of a file of pairs.

    Args:
        videos: the videos of the command line.
        reference: the default reference.
        file: a CSV file of pairs.
        allow_outside: whether the file may contain paths outside its folder.
        prompt: the default prompt.
        needs: the inputs that the rewards need in addition to a video.
    Raises:
        ConfigError: there is nothing to score, both videos and a file were given, the file is missing or invalid, or a
            needed input is missing.
    """
    if file is None:
        pairs = pairs_of_arguments(videos, reference, prompt, needs)
    elif videos:
        raise ConfigError("videos and --pairs exclude each other: use only one of them")
    else:
        pairs = pairs_of_file(file, reference, allow_outside, prompt, needs)
    if "prompt" in needs and not any(pair.prompt for pair in pairs):
        raise ConfigError(
            "the rewards need prompts, but none were given: set --prompt for all videos, or add a column 'prompt' to "
            "the file of --pairs"
        )
    return pairs


def pairs_of_arguments(
    videos: Sequence[str],
    reference: str | None,
    prompt: str | None = None,
    needs: Collection[Need] = ("reference",),
) -> list[Pair]:
    """Return pairs of each video and the same reference.

    Raises:
        ConfigError: there is no video, or a needed reference is missing.
    """
    if not videos:
        raise ConfigError("nothing to score: give videos as arguments, or a file with --pairs")
    if reference is None and not COMPARES.isdisjoint(needs):
        raise ConfigError(
            "--reference is missing: give a picture or video of the person or object that the videos should show"
        )
    return [Pair(index, video, reference or "", prompt or "") for index, video in enumerate(videos)]


def pairs_of_file(
    file: Path,
    reference: str | None = None,
    allow_outside: bool = False,
    prompt: str | None = None,
    needs: Collection[Need] = ("reference",),
) -> list[Pair]:
    """Return the pairs of a CSV file with the column `video` and the optional columns `reference` and `prompt`.

    Paths are relative to the folder of the file, and must be inside it. If the rewards need a reference, a row without
    one uses `reference`; without `reference`, the video is compared with itself.

    Args:
        file: the CSV file.
        reference: the default reference.
        allow_outside: whether the file may contain paths outside its folder.
        prompt: the default prompt.
        needs: the inputs that the rewards need in addition to a video.
    Raises:
        ConfigError: the file cannot be read, has no rows, or is not a valid CSV file of pairs. An invalid row has a
            `fault` instead.
    """
    default = Pair(0, "", reference or "", prompt or "")
    rows = enumerate(rows_of_csv(io.StringIO(_text(file), newline=""), str(file)))
    pairs = [pair_of_row(index, row, file.parent, default, allow_outside, needs) for index, row in rows]
    if not pairs:
        raise ConfigError(f"{file}: contains no rows")
    return pairs


def _text(file: Path) -> str:
    try:
        # File names need not be valid UTF-8.
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise ConfigError(f"no such file of pairs: {file}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def rows_of_csv(lines: Iterable[str], name: str) -> Iterator[dict[str | None, Any]]:
    """Yield the rows of a CSV file of pairs as dictionaries; see `csv_records`.

    Args:
        lines: the lines of the file; see `csv_records`.
        name: the name of the file for error messages.
    Raises:
        ConfigError: the file is not a valid CSV file of pairs.
    """
    try:
        for _, record in csv_records(lines, lambda columns: check_columns(columns, name)):
            yield record
    except DataError as error:
        raise ConfigError(f"{name}, {error}") from error


def check_columns(columns: Sequence[str], name: str) -> None:
    """Check the columns of a file of pairs.

    Raises:
        ConfigError: the column `video` is missing, or a column seems to be a misspelt `reference`.
    """
    if "video" not in columns:
        raise ConfigError(f"{name}: has no column 'video' (found {', '.join(columns) or 'nothing'})")
    for column in columns:
        # A misspelt column would be ignored, and every video would be compared with itself.
        if column != "reference" and difflib.get_close_matches(column.lower(), ["reference"], cutoff=0.5):
            raise ConfigError(f"{name}: unknown column {column!r}: did you mean 'reference'?")


def pair_of_row(
    index: int,
    row: Mapping[str | None, Any],
    folder: Path | str,
    default: Pair,
    allow_outside: bool,
    needs: Collection[Need],
) -> Pair:
    """Return a row of a file of pairs as a pair; an invalid row has a `fault`.

    Args:
        index: the position of the row.
        row: the cells by column.
        folder: the folder of the file, a path or URL.
        default: the default reference and prompt.
        allow_outside: whether the row may contain paths outside `folder`.
        needs: the inputs that the rewards need in addition to a video.
    """
    cells = {name: (row.get(name) or "").strip() for name in ("video", "reference", "prompt")}
    faults = []
    if None in row:  # csv.DictReader stores additional fields under this key
        faults.append("the row has more fields than the header; quote prompts that contain commas")
    if not cells["video"]:
        faults.append("the column 'video' is empty")
    paths = {}
    for name in ("video", "reference"):
        paths[name] = joined(folder, cells[name]) if cells[name] else ""
        try:
            check_inside(folder, cells[name], "--allow-outside", allow_outside)
        except DataError as error:
            paths[name] = cells[name]
            faults.append(str(error))
    reference = paths["reference"] or default.reference or ("" if COMPARES.isdisjoint(needs) else paths["video"])
    prompt = text_of_csv_cell(cells["prompt"]) or default.prompt
    return Pair(index, paths["video"], reference, prompt, "; ".join(faults))
