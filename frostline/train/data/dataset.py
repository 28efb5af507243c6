"""Training data: rows of a metadata file, prompts, or a folder of captioned videos, as samples for the module."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from frostline.allocation import is_out_of_memory
from frostline.errors import DataError
from frostline.models.video_shape import Geometry
from frostline.stages.families import DEFAULT_GEOMETRY
from frostline.train.data.batch import pad_frames
from frostline.train.data.cutting import crop_to, frames_at_once, size_within
from frostline.train.data.needs import DEFAULT_NEEDS, SampleNeeds
from frostline.train.data.references import check_references, read_references
from frostline.train.data.rows import REFERENCE, Row, read_rows, resolve_source
from frostline.video import count_frames, equal_frames, probe_video

logger = logging.getLogger(__name__)


class Sample(TypedDict):
    """One sample; `video` is float32 `(T, 3, H, W)` in [0, 1], of a size that the model takes.

    valid_frames: so many are the video's own, all if not given; what follows repeats the last of them. Of a sample
        without a video it is 0, and `video` is black.
    reference: pictures of the subject, float32 `(R, 3, h, w)` in [0, 1], where the row names some.
    fps: frames per second of `video`; None where that is not known, as of a picture.
    notes: what there is to tell of it, where it was read by a worker process; otherwise it was logged.
    """

    sample_id: str
    prompt: str
    video: torch.Tensor
    valid_frames: NotRequired[int]
    reference: NotRequired[torch.Tensor | None]
    fps: NotRequired[float | None]
    notes: NotRequired[tuple[str, ...]]


class CollatedBatch(TypedDict):
    """A batch as `module.forward` takes it; `video` is float32 `(B, T, 3, H, W)` in [0, 1]. notes: of all samples.

    reference: of each sample pictures `(R, 3, h, w)`, or None.
    """

    sample_id: list[str]
    prompt: list[str]
    video: torch.Tensor
    valid_frames: list[int]
    reference: list[torch.Tensor | None]
    fps: list[float | None]
    notes: list[str]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on.

    `row` is the line in a csv, jsonl or txt file (a csv header is line 1), the item's place from 1 in a json list,
    or the video's place from 1 in a folder. `field` is `video`, `prompt`, `reference`, or `row` for the row as a whole.
    """

    file: Path
    row: int
    sample_id: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (sample {self.sample_id}), field '{self.field}': {self.reason}"


@dataclass(frozen=True)
class DataCheck:
    """What a look at all rows found.

    bad: those that cannot be trained on. short: samples that have to be padded. sizes: heights and widths of the videos
    of the others, upright and before they are cut.
    """

    bad: list[BadRow]
    short: list[str]
    sizes: frozenset[tuple[int, int]] = frozenset()


class VideoPromptDataset(Dataset[Sample]):
    """Videos with prompts, cut and resized to what a model takes.

    source: a `metadata.csv`, `.jsonl` or `.json` file with the columns `video`, `prompt` and, optionally, `reference`
    (UTF-8, BOM allowed, paths relative to the file), a folder that contains one, a `.txt` file with a prompt in each
    line, or a folder of videos with .txt captions of the same name. See docs/data.md.
    num_frames: frames of every sample, taken from the video's start, `frame_stride` apart; where it has
    fewer, the last is repeated.
    height, width: the size of every sample; left out, each video keeps its own, shrunk to at most `max_pixels` and
    rounded down to the multiples that the model takes. Videos are resized to cover the size and cropped at the centre.
    A sample without a video is then the square of about `max_pixels`.
    allow_outside: let the metadata name videos and references, and captions be links to files, outside of the source's
    folder; only for data you trust.
    geometry: the videos that the model takes.
    needs: what model and rewards need: whether a row may do without a video, and whether references are read.

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
        geometry: Geometry = DEFAULT_GEOMETRY,
        needs: SampleNeeds = DEFAULT_NEEDS,
    ) -> None:
        geometry.check_cut(num_frames, height, width, max_pixels, frame_stride)
        self.num_frames = num_frames
        self.size = (height, width) if height is not None and width is not None else None
        self.max_pixels = max_pixels
        self.frame_stride = frame_stride
        self.geometry = geometry
        self.needs = needs
        self.source = resolve_source(Path(source))
        self._rows = tuple(self._refused_without_video(row) for row in read_rows(self.source, allow_outside))
        if not self._rows:
            raise DataError(f"{self.source}: holds no rows")
        faults = [self._bad_row(row, *row.fault) for row in self._rows if row.fault is not None]
        if len(faults) == len(self._rows):
            raise DataError(f"{faults[0]} (none of the {len(faults)} rows is usable)")
        self._states = {path: _state_of(path) for row in self._rows for path in self._paths(row)}
        self._rates: dict[Path, float | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        if row.fault is not None:
            raise DataError(str(self._bad_row(row, *row.fault)))
        notes: list[str] = []
        for path in self._paths(row):
            if _state_of(path) != self._states[path]:
                notes.append(f"{path}: replaced or changed since the run began; what it shows now is used")
        reference, fps = None, None
        field = "video"
        try:
            if row.video is None:
                video, valid_frames = torch.zeros(self.num_frames, 3, *self._size_without_video()), 0
            else:
                video = self._read(row.video, notes)
                valid_frames = len(video)
                fps = self._fps(row.video)
            field = REFERENCE
            if row.reference and self.needs.references:
                warn = functools.partial(_add_note, notes, f"sample {row.sample_id}")
                reference = read_references(row.reference, warn)
        except DataError as error:
            raise DataError(str(self._bad_row(row, field, str(error)))) from error
        if len(video) < self.num_frames:
            padded = f"{valid_frames} frames, padded to {self.num_frames} by repeating the last"
            notes.append(f"sample {row.sample_id}: {padded}")
            video = pad_frames(video, self.num_frames, dim=0)
        if get_worker_info() is None:
            tell_once(notes)
            notes = []
        return {
            "sample_id": row.sample_id,
            "prompt": row.prompt,
            "video": video,
            "valid_frames": valid_frames,
            "reference": reference,
            "fps": fps,
            "notes": tuple(notes),
        }

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """The samples' names, in order: the video as the metadata writes it, with `#row` where that repeats.

        Rows without a video are called `row-N`.
        """
        return tuple(row.sample_id for row in self._rows)

    def validate(self, deep: bool = False) -> list[BadRow]:
        """Return all rows that cannot be trained on.

        Opens every video and reference and decodes its first frame, or, with `deep`, every frame that training would
        use.
        """
        return self.check(deep).bad

    def check(self, deep: bool = False) -> DataCheck:
        """Look at all rows as `validate` does, and count the frames of each video."""
        bad, short, sizes = [], [], set()
        # Many samples may show one person.
        look_at_references = functools.cache(check_references)
        for row in self._rows:
            field = "video"
            try:
                frames, size = self._look_at_video(row, deep)
                field = REFERENCE
                if row.reference and self.needs.references:
                    look_at_references(row.reference, deep)
                if frames < self.num_frames:
                    short.append(row.sample_id)
                sizes.add(size)
            except DataError as error:
                bad.append(self._bad_row(row, *(row.fault or (field, str(error)))))
        return DataCheck(bad, short, frozenset(sizes))

    def describe_padding(self, short: Sequence[str]) -> str:
        """Say what becomes of these samples, which `check` found short."""
        clips = f"{len(short)} of {len(self)} clips have fewer than {self.num_frames} frames"
        return f"{clips}: their last frame is repeated, and no reward refers to the copies"

    def _look_at_video(self, row: Row, deep: bool) -> tuple[int, tuple[int, int]]:
        """Of a video, how many frames there are for a sample, and their height and width.

        Raises:
            DataError: the row has a fault, or its video cannot be read.
        """
        if row.fault is not None:
            raise DataError(row.fault[1])
        if row.video is None:
            return self.num_frames, self._size_without_video()
        if deep:
            frames = sum(1 for _ in equal_frames(row.video, self.num_frames, self.frame_stride))
            info = probe_video(row.video)
        else:
            info = probe_video(row.video)
            frames = math.ceil(count_frames(row.video, self.num_frames * self.frame_stride) / self.frame_stride)
        return frames, (info.height, info.width)

    def _read(self, path: Path, notes: list[str]) -> torch.Tensor:
        """A video's frames as a sample has them, float32 `(T, 3, H, W)`; resized as they arrive.

        Raises:
            DataError: it cannot be read, or does not fit into memory.
        """
        pieces: list[torch.Tensor] = []
        waiting: list[np.ndarray] = []
        warn = functools.partial(_add_note, notes, str(path))
        try:
            for _, picture in equal_frames(path, self.num_frames, self.frame_stride, warn):
                waiting.append(picture)
                if len(waiting) == frames_at_once(*picture.shape[:2]):
                    pieces.append(self._cut(waiting))
                    waiting = []
            if waiting:
                pieces.append(self._cut(waiting))
            return torch.cat(pieces)
        except (MemoryError, RuntimeError) as error:  # the latter is torch's
            if is_out_of_memory(error):
                raise DataError(f"{path}: its frames do not fit into memory") from error
            raise

    def _cut(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        height, width = pictures[0].shape[:2]
        frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return crop_to(frames, self.size or size_within(height, width, self.max_pixels, self.geometry.spatial_multiple))

    def _refused_without_video(self, row: Row) -> Row:
        """The row, at fault where it names no video and one is needed."""
        if row.video is not None or row.fault is not None:
            return row
        reason = self.needs.refuses_without_video(has_reference=bool(row.reference))
        return replace(row, fault=("video", f"{row.no_video}, and {reason}")) if reason else row

    def _size_without_video(self) -> tuple[int, int]:
        """(height, width) of a sample that has no video."""
        side = self.geometry.square_side(self.max_pixels)
        return self.size or (side, side)

    def _paths(self, row: Row) -> list[Path]:
        """The files and folders that a sample is read from."""
        if row.fault is not None:
            return []
        videos = [] if row.video is None else [row.video]
        return [*videos, *(row.reference if self.needs.references else ())]

    def _fps(self, path: Path) -> float | None:
        """Frames per second of a sample's clip; asked of each file once."""
        if path not in self._rates:
            self._rates[path] = probe_video(path).fps / self.frame_stride or None
        return self._rates[path]

    def _bad_row(self, row: Row, field: str, reason: str) -> BadRow:
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
        "valid_frames": [sample.get("valid_frames", len(sample["video"])) for sample in samples],
        "reference": [sample.get("reference") for sample in samples],
        "fps": [sample.get("fps") for sample in samples],
        "notes": [note for sample in samples for note in sample.get("notes", ())],
    }


def tell_once(notes: Iterable[str]) -> None:
    """Log each of these, once a process."""
    for note in notes:
        _log_once(note)


def _state_of(path: Path) -> tuple[int, int] | None:
    """By what a file is known again: its size and when it was changed last; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _add_note(notes: list[str], where: str, note: str) -> None:
    notes.append(f"{where}: {note}")


@functools.cache
def _log_once(note: str) -> None:
    logger.warning("%s", note)
