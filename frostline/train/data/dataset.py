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
    """One sample; `video` is float32 `(T, 3, H, W)` in [0, 1], with a size that the model supports.

    Attributes:
        valid_frames: number of frames of the video without padding; all if not given. The padding repeats the last
            frame. For a sample without a video it is 0, and `video` is black.
        reference: pictures of the subject, float32 `(R, 3, h, w)` in [0, 1], if the row names some.
        fps: frames per second of `video`; None if unknown, for example for a picture.
        notes: warnings about the sample from a worker process, which the main process logs.
    """

    sample_id: str
    prompt: str
    video: torch.Tensor
    valid_frames: NotRequired[int]
    reference: NotRequired[torch.Tensor | None]
    fps: NotRequired[float | None]
    notes: NotRequired[tuple[str, ...]]


class CollatedBatch(TypedDict):
    """A batch for `module.forward`; `video` is float32 `(B, T, 3, H, W)` in [0, 1].

    Attributes:
        notes: messages about all samples.
        reference: for each sample, pictures `(R, 3, h, w)`, or None.
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
    """An invalid row.

    Attributes:
        row: the line in a csv, jsonl or txt file (a csv header is line 1), the position from 1 in a json list, or the
            video's position from 1 in a folder.
        field: `video`, `prompt`, `reference`, or `row` for the row as a whole.
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
    """The result of checking all rows.

    Attributes:
        bad: invalid rows.
        short: samples that need padding.
        sizes: (height, width) of the videos in valid rows, after rotation to upright and before cropping.
    """

    bad: list[BadRow]
    short: list[str]
    sizes: frozenset[tuple[int, int]] = frozenset()


class VideoPromptDataset(Dataset[Sample]):
    """Videos with prompts, cropped and resized to what a model supports.

    Invalid rows do not affect the others: `validate` lists all of them, and accessing one raises a DataError.

    Args:
        source: a `metadata.csv`, `.jsonl` or `.json` file with the columns `video`, `prompt` and, optionally,
            `reference` (UTF-8, BOM allowed, paths relative to the file), a folder that contains one, a `.txt` file with
            a prompt in each line, or a folder of videos with .txt captions of the same name. See docs/data.md.
        num_frames: frames of every sample, from the start of the video, `frame_stride` apart; the last frame of a
            shorter video is repeated.
        height, width: size of every sample; if not given, each video keeps its own size, reduced to at most
            `max_pixels` and rounded down to multiples that the model supports. Videos are resized to cover the size and
            cropped at the centre. A sample without a video is then a square of about `max_pixels`.
        allow_outside: let the metadata name videos and references outside of the source's folder, and captions be links
            to such files; only for trusted data.
        geometry: the video sizes that the model supports.
        needs: requirements of model and rewards: whether a row needs a video, and whether references are read.
    Raises:
        ConfigError: the model does not support these sizes.
        DataError: the source cannot be read, or all rows are invalid.
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
            raise DataError(f"{self.source}: contains no rows")
        faults = [self._bad_row(row, *row.fault) for row in self._rows if row.fault is not None]
        if len(faults) == len(self._rows):
            raise DataError(f"{faults[0]} (all {len(faults)} rows are invalid)")
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
                notes.append(f"{path}: replaced or changed since the run began; using the new content")
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
        """Return the names of the samples in order: the video as written in the metadata, with `#row` if that is not
        unique.

        Rows without a video are named `row-N`.
        """
        return tuple(row.sample_id for row in self._rows)

    def validate(self, deep: bool = False) -> list[BadRow]:
        """Return all invalid rows.

        Opens every video and reference and decodes its first frame or, with `deep`, every frame that training uses.
        """
        return self.check(deep).bad

    def check(self, deep: bool = False) -> DataCheck:
        """Check all rows like `validate`, and count the frames of each video."""
        bad, short, sizes = [], [], set()
        # Many samples may share the same reference.
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
        """Describe the padding of these samples, which `check` found too short."""
        clips = f"{len(short)} of {len(self)} clips have fewer than {self.num_frames} frames"
        return f"{clips}: their last frame is repeated, and rewards ignore the copies"

    def _look_at_video(self, row: Row, deep: bool) -> tuple[int, tuple[int, int]]:
        """Return the number of frames for a sample in a video, and their height and width.

        Raises:
            DataError: the row is invalid, or its video cannot be read.
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
        """Return a video's frames for a sample, float32 `(T, 3, H, W)`, resized while they are read.

        Raises:
            DataError: the video cannot be read, or does not fit into memory.
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
        except (MemoryError, RuntimeError) as error:  # PyTorch raises RuntimeError
            if is_out_of_memory(error):
                raise DataError(f"{path}: not enough memory for its frames") from error
            raise

    def _cut(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        height, width = pictures[0].shape[:2]
        frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return crop_to(frames, self.size or size_within(height, width, self.max_pixels, self.geometry.spatial_multiple))

    def _refused_without_video(self, row: Row) -> Row:
        """Return the row, marked as invalid if it has no video but needs one."""
        if row.video is not None or row.fault is not None:
            return row
        reason = self.needs.refuses_without_video(has_reference=bool(row.reference))
        return replace(row, fault=("video", f"{row.no_video}, but {reason}")) if reason else row

    def _size_without_video(self) -> tuple[int, int]:
        """Return (height, width) of a sample that has no video."""
        side = self.geometry.square_side(self.max_pixels)
        return self.size or (side, side)

    def _paths(self, row: Row) -> list[Path]:
        """Return the files and folders that a sample is read from."""
        if row.fault is not None:
            return []
        videos = [] if row.video is None else [row.video]
        return [*videos, *(row.reference if self.needs.references else ())]

    def _fps(self, path: Path) -> float | None:
        """Return frames per second of a sample's clip, None if unknown; each file is read only once."""
        if path not in self._rates:
            self._rates[path] = probe_video(path).fps / self.frame_stride or None
        return self._rates[path]

    def _bad_row(self, row: Row, field: str, reason: str) -> BadRow:
        return BadRow(self.source, row.number, row.sample_id, field, reason)


def collate(samples: Sequence[Sample]) -> CollatedBatch:
    """Stack samples of one shape into a batch for `module.forward`.

    Raises:
        DataError: the shapes of two videos differ.
    """
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
    """Log each message once per process."""
    for note in notes:
        _log_once(note)


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a file, which identify its content; None if it does not exist."""
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
