"""What to score: pairs of a video and a reference, from the command line or from a CSV file."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.csvfile import csv_columns, csv_records
from frostline.errors import ConfigError, DataError
from frostline.escaping import text_of_csv_cell
from frostline.paths import check_inside, joined
from frostline.rewards.inputs import COMPARES, Need


@dataclass(frozen=True)
class Pair:
    """One video to score. `index` is its place in the input, `fault` why it cannot be scored, if that is known.

    reference: empty where no reward needs one. prompt: empty where there is none.
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
    """The videos that the command line names, or a file of pairs.

    Args:
        prompt: of the videos that have none of their own.
        needs: what the rewards need beside a video.
    Raises:
        ConfigError: there is nothing to score, both were given, or what the rewards need is missing.
    """
    if file is None:
        pairs = pairs_of_arguments(videos, reference, prompt, needs)
    elif videos:
        raise ConfigError("name videos or give --pairs, not both")
    else:
        pairs = pairs_of_file(file, reference, allow_outside, prompt, needs)
    if "prompt" in needs and not any(pair.prompt for pair in pairs):
        raise ConfigError(
            "the rewards need prompts, and there are none: give one for all videos by --prompt, or each its own in the "
            "column 'prompt' of --pairs"
        )
    return pairs


def pairs_of_arguments(
    videos: Sequence[str],
    reference: str | None,
    prompt: str | None = None,
    needs: Collection[Need] = ("reference",),
) -> list[Pair]:
    """Every video against one reference.

    Raises:
        ConfigError: there is no video, or no reference where one is needed.
    """
    if not videos:
        raise ConfigError("nothing to score: name videos, or a file of them with --pairs")
    if reference is None and not COMPARES.isdisjoint(needs):
        raise ConfigError("--reference is missing: a picture or video of who or what the videos should show")
    return [Pair(index, video, reference or "", prompt or "") for index, video in enumerate(videos)]


def pairs_of_file(
    file: Path,
    reference: str | None = None,
    allow_outside: bool = False,
    prompt: str | None = None,
    needs: Collection[Need] = ("reference",),
) -> list[Pair]:
    """The rows of a CSV file with the column `video` and, if they are there, `reference` and `prompt`.

    Paths are relative to the file and must stay inside its folder. Where the rewards need a reference, a row without
    one is scored against `reference`, and where that is not given against itself: how well the video keeps its own
    face.

    Args:
        allow_outside: let the file name others outside of its own folder.
        prompt: of the rows that have none of their own.
        needs: what the rewards need beside a video.
    Raises:
        ConfigError: the file is missing or no such CSV file. What is wrong with one row is its pair's `fault`.
    """
    default = Pair(0, "", reference or "", prompt or "")
    rows = enumerate(rows_of_csv(_text(file), str(file)))
    pairs = [pair_of_row(index, row, file.parent, default, allow_outside, needs) for index, row in rows]
    if not pairs:
        raise ConfigError(f"{file}: holds no rows")
    return pairs


def _text(file: Path) -> str:
    try:
        # Names that are no UTF-8 are names, too.
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise ConfigError(f"no such file of pairs: {file}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def rows_of_csv(text: str, name: str) -> Iterator[dict[str | None, Any]]:
    """Yield the rows of a CSV file of pairs, by column; see `csv_records`.

    Raises:
        ConfigError: it is no such file; `name` says which.
    """
    try:
        check_columns(csv_columns(text), name)
        for _, record in csv_records(text):
            yield record
    except DataError as error:
        raise ConfigError(f"{name}, {error}") from error


def check_columns(columns: Sequence[str], name: str) -> None:
    """Refuse the columns of a file of pairs that has no videos, or a misspelt `reference`.

    Raises:
        ConfigError: names the file and the column.
    """
    if "video" not in columns:
        raise ConfigError(f"{name}: has no column 'video' (found {', '.join(columns) or 'nothing'})")
    for column in columns:
        # Unread, it would leave every video to be scored against itself.
        if column != "reference" and difflib.get_close_matches(column.lower(), ["reference"], cutoff=0.5):
            raise ConfigError(f"{name}: has a column {column!r}: is 'reference' meant?")


def pair_of_row(
    index: int,
    row: Mapping[str | None, Any],
    folder: Path | str,
    default: Pair,
    allow_outside: bool,
    needs: Collection[Need],
) -> Pair:
    """Return a row of a file of pairs in `folder`, a path or a URL, as a pair; what is wrong with it is its `fault`."""
    cells = {name: (row.get(name) or "").strip() for name in ("video", "reference", "prompt")}
    faults = []
    if None in row:  # where csv.DictReader puts what is beyond the header
        faults.append("the row has more fields than the header; quote a prompt that holds commas")
    if not cells["video"]:
        faults.append("the row names no video")
    paths = {}
    for name in ("video", "reference"):
        # Nothing stays nothing.
        paths[name] = joined(folder, cells[name]) if cells[name] else ""
        try:
            check_inside(folder, cells[name], "--allow-outside", allow_outside)
        except DataError as error:
            paths[name] = cells[name]
            faults.append(str(error))
    reference = paths["reference"] or default.reference or ("" if COMPARES.isdisjoint(needs) else paths["video"])
    prompt = text_of_csv_cell(cells["prompt"]) or default.prompt
    return Pair(index, paths["video"], reference, prompt, "; ".join(faults))
