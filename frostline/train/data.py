"""Training data: rows of a metadata file, or a folder of captioned videos, as samples for the module."""

import csv
import functools
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset

from frostline.errors import DataError
from frostline.escaping import is_text
from frostline.models.geometry import SPATIAL_MULTIPLE, check_cut
from frostline.paths import check_inside
from frostline.train.batch import nearest_name, pad_frames, resize
from frostline.video import MEDIA_SUFFIXES, probe_video, read_video

logger = logging.getLogger(__name__)

COLUMNS = ("video", "prompt")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")
_FRAMES_AT_ONCE = 8
"""Frames resized together: enough to be quick, few enough that a long HD clip is never whole in float32."""


class Sample(TypedDict):
    """One sample; `video` is float32 `(T, 3, H, W)` in [0, 1], T = 4k+1, H and W multiples of what the model takes."""

    sample_id: str
    prompt: str
    video: torch.Tensor


class CollatedBatch(TypedDict):
    """A batch as `module.forward` takes it; `video` is float32 `(B, T, 3, H, W)` in [0, 1]."""

    sample_id: list[str]
    prompt: list[str]
    video: torch.Tensor


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on.

    `row` is the line in a csv or jsonl file (a csv header is line 1), the item's place from 1 in a json list,
    or the video's place from 1 in a folder. `field` is `video`, `prompt`, or `row` for the row as a whole.
    """

    file: Path
    row: int
    sample_id: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (sample {self.sample_id}), field '{self.field}': {self.reason}"


@dataclass(frozen=True)
class _Row:
    """A row that names a video and a prompt, or the fault (field, reason) that keeps it from doing so."""

    number: int
    sample_id: str
    video: Path = Path()
    prompt: str = ""
    fault: tuple[str, str] | None = None


class VideoPromptDataset(Dataset[Sample]):
    """Videos with prompts, cut and resized to what Wan takes.

    source: a `metadata.csv`, `.jsonl` or `.json` file with the columns `video` and `prompt` (UTF-8, BOM
    allowed, paths relative to the file), a folder that holds one, or a folder of videos with .txt captions of
    the same name.
    num_frames: frames of every sample, 4k+1, taken from the video's start, `frame_stride` apart.
    height, width: the size of every sample; left out, each video keeps its own, shrunk to at most `max_pixels` and
    rounded down to multiples of `multiple`. Videos are resized to cover the size and cropped at the centre.
    allow_outside: let the metadata name videos outside its own folder; only for metadata you trust.
    multiple: of which sides must be multiples: `Skeleton.spatial_multiple` of the model.

    A row at fault does not stop the others: `validate` lists all of them, asking for one raises DataError.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        num_frames: int = 17,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int = 480 * 832,
        frame_stride: int = 1,
        allow_outside: bool = False,
        multiple: int = SPATIAL_MULTIPLE,
    ) -> None:
        check_cut(num_frames, height, width, max_pixels, frame_stride, multiple)
        self.num_frames = num_frames
        self.size = (height, width) if height is not None and width is not None else None
        self.max_pixels = max_pixels
        self.frame_stride = frame_stride
        self.multiple = multiple
        self.source = _resolve_source(Path(source))
        self._rows = _with_unique_ids(_read_rows(self.source, allow_outside))
        if not self._rows:
            raise DataError(f"{self.source}: holds no rows")
        faults = [self._bad_row(row, *row.fault) for row in self._rows if row.fault is not None]
        if len(faults) == len(self._rows):
            raise DataError(f"{faults[0]} (none of the {len(faults)} rows is usable)")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        if row.fault is not None:
            raise DataError(str(self._bad_row(row, *row.fault)))
        try:
            frames = read_video(row.video, max_frames=self.num_frames, stride=self.frame_stride)
        except DataError as error:
            raise DataError(str(self._bad_row(row, "video", str(error)))) from error
        height, width = frames.shape[-2:]
        video = crop_to(frames, self.size or size_within(height, width, self.max_pixels, self.multiple))
        if len(video) < self.num_frames:
            _log_padding(row.sample_id, len(video), self.num_frames)
            video = pad_frames(video, self.num_frames, dim=0)
        return {"sample_id": row.sample_id, "prompt": row.prompt, "video": video}

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """The samples' names, in order: the video as the metadata writes it, with `#row` where that repeats."""
        return tuple(row.sample_id for row in self._rows)

    def validate(self, deep: bool = False) -> list[BadRow]:
        """All rows that cannot be trained on.

        Opens every video and decodes its first frame, or, with `deep`, every frame that training would use.
        """
        return [bad for row in self._rows if (bad := self._fault_of(row, deep)) is not None]

    def _fault_of(self, row: _Row, deep: bool) -> BadRow | None:
        if row.fault is not None:
            return self._bad_row(row, *row.fault)
        try:
            if deep:
                read_video(row.video, max_frames=self.num_frames, stride=self.frame_stride)
            else:
                probe_video(row.video)
        except DataError as error:
            return self._bad_row(row, "video", str(error))
        return None

    def _bad_row(self, row: _Row, field: str, reason: str) -> BadRow:
        return BadRow(self.source, row.number, row.sample_id, field, reason)


def collate(samples: Sequence[Sample]) -> CollatedBatch:
    """Stack samples of one shape into the batch that `module.forward` takes."""
    first = samples[0]
    for sample in samples:
        shape, first_shape = tuple(sample["video"].shape), tuple(first["video"].shape)
        if shape != first_shape:
            raise DataError(
                f"sample {sample['sample_id']}, field 'video': shape {shape} differs from {first_shape} of sample "
                f"{first['sample_id']}; set height and width, or use a batch size of 1"
            )
    return {
        "sample_id": [sample["sample_id"] for sample in samples],
        "prompt": [sample["prompt"] for sample in samples],
        "video": torch.stack([sample["video"] for sample in samples]),
    }


def size_within(height: int, width: int, max_pixels: int, multiple: int = SPATIAL_MULTIPLE) -> tuple[int, int]:
    """(height, width) shrunk to at most `max_pixels`, in multiples rounded down, at least one of them each."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    # The small term keeps a size that is already a multiple from falling to the next through rounding.
    fitted = [max(1, math.floor(side * scale / multiple + 1e-9)) for side in (height, width)]
    return fitted[0] * multiple, fitted[1] * multiple


def crop_to(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 `(T, 3, H, W)` as float32 in [0, 1], cut to `size` (height, width)."""
    height, width = size
    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    covering = max(height, round(frames.shape[-2] * scale)), max(width, round(frames.shape[-1] * scale))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pieces: list[torch.Tensor] = []
    for piece in frames.split(_FRAMES_AT_ONCE):
        pixels = piece.float() / 255
        if covering != tuple(pixels.shape[-2:]):
            pixels = resize(pixels, covering)
        pieces.append(pixels[..., top : top + height, left : left + width])
    return torch.cat(pieces)


@functools.cache
def _log_padding(sample_id: str, frames: int, num_frames: int) -> None:
    logger.warning("sample %s: %d frames, padded to %d by repeating the last", sample_id, frames, num_frames)


def _resolve_source(source: Path) -> Path:
    """The metadata file, or the folder of captioned videos, that `source` means."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        if source.suffix.lower() not in _READERS:
            raise DataError(f"{source}: metadata must be a .csv, .jsonl or .json file")
        return source
    found = [source / name for name in METADATA_NAMES if (source / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{source}: holds {' and '.join(path.name for path in found)}; name the one to use")
    return found[0] if found else source


def _read_rows(source: Path, allow_outside: bool) -> Iterator[_Row]:
    return _rows_of_folder(source) if source.is_dir() else _rows_of_metadata(source, allow_outside)


def _rows_of_folder(folder: Path) -> Iterator[_Row]:
    """The videos under a folder in the order of their names, with the captions beside them."""

    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MEDIA_SUFFIXES)
    for number, video in enumerate(videos, 1):
        sample_id = video.relative_to(folder).as_posix()
        caption = video.with_suffix(".txt")
        prompt, reason = "", f"the caption {caption.name} is empty"
        try:
            prompt = caption.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            reason = f"no caption file {caption.name} beside the video"
        except (OSError, UnicodeDecodeError) as error:
            reason = f"the caption {caption.name} cannot be read: {error}"
        yield _Row(number, sample_id, video, prompt, fault=None if prompt else ("prompt", reason))


def _rows_of_metadata(file: Path, allow_outside: bool) -> Iterator[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{file}: is empty")
    for number, record in _READERS[file.suffix.lower()](file, text):
        yield _parse_row(file.parent, number, record, allow_outside)


def _read_csv(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            # The reader tells the line where a row ends; a quoted prompt may have begun some lines before.
            yield reader.line_num - sum(str(value).count("\n") for value in record.values()), record
    except csv.Error as error:
        raise DataError(f"{file}, row {reader.line_num + 1}: is not well-formed csv: {error}") from error


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


def _parse_row(folder: Path, number: int, record: Any, allow_outside: bool) -> _Row:
    """One record as a row; whatever is wrong with it becomes the row's fault."""
    sample_id = f"row-{number}"

    def bad(field: str, reason: str) -> _Row:
        return _Row(number, sample_id, fault=(field, reason))

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
        check_inside(folder, video, "allow_outside=True", allow_outside)
    except DataError as error:
        return bad("video", str(error))
    return _Row(number, sample_id, Path(os.path.normpath((folder / video).absolute())), record["prompt"].strip())


def _with_unique_ids(rows: Iterator[_Row]) -> tuple[_Row, ...]:
    """Rows with `#row` added to the names that several of them share."""
    listed = tuple(rows)
    counts = Counter(row.sample_id for row in listed)
    return tuple(
        row if counts[row.sample_id] == 1 else replace(row, sample_id=f"{row.sample_id}#{row.number}") for row in listed
    )
