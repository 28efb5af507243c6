"""Rows with references, and rows without a video: read from tables, lists of prompts and folders."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from frostline.errors import DataError
from frostline.train.data import dataset as dataset_module
from frostline.train.data.batch import check_batch
from frostline.train.data.data_order import DataOrder
from frostline.train.data.dataset import VideoPromptDataset, collate
from frostline.train.data.loader import Batches
from frostline.train.data.needs import SampleNeeds
from frostline.train.data.rows import read_rows
from frostline.video import write_video

NOTHING_NEEDED = SampleNeeds("", (), references=False)
NO_START = SampleNeeds("", ("the reward face_identity",))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = torch.full((5, 3, 32, 48), 90, dtype=torch.uint8)
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames, fps=24, lossless=True)


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    """Create `a.mp4`, `face.png` (all pixels 200) and `her/` with two pictures (100 and 150); return the folder."""
    (tmp_path / "a.mp4").symlink_to(clip)
    (tmp_path / "her").mkdir()
    for name, shade in (("face.png", 200), ("her/1.png", 100), ("her/2.jpg", 150)):
        Image.new("RGB", (32, 32), (shade,) * 3).save(tmp_path / name)
    return tmp_path


def shades(sample: Any) -> list[int] | None:
    """Return the grey level of each reference picture."""
    pictures = sample["reference"]
    return None if pictures is None else (pictures.mean(dim=(1, 2, 3)) * 255).round().int().tolist()


RECORDS: list[dict[str, Any]] = [
    {"video": "a.mp4", "prompt": "one", "reference": "face.png"},
    {"video": "a.mp4", "prompt": "two", "reference": " her "},
    {"video": "a.mp4", "prompt": "three", "reference": ""},
]
CSV = "video,prompt,reference\n" + "".join(f"{r['video']},{r['prompt']},{r['reference']}\n" for r in RECORDS)
IN_JSON = [*RECORDS, {"video": "a.mp4", "prompt": "four", "reference": ["face.png", "her/2.jpg"]}]
TABLES = {
    "metadata.csv": CSV,
    "metadata.json": json.dumps([*IN_JSON, {"video": "a.mp4", "prompt": "five", "reference": None}]),
    "metadata.jsonl": "\n".join(map(json.dumps, [*IN_JSON, {"video": "a.mp4", "prompt": "five"}])),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_column_names_pictures(folder: Path, name: str) -> None:
    (folder / name).write_text(TABLES[name])
    dataset = VideoPromptDataset(folder, num_frames=5)
    samples = [dataset[index] for index in range(len(dataset))]
    assert [shades(sample) for sample in samples] == [[200], [100, 150], None, [200, 150], None][: len(samples)]
    assert dataset.validate() == dataset.validate(deep=True) == []
    assert [sample.get("fps") for sample in samples] == [24.0] * len(samples)


def test_a_batch_keeps_the_pictures_of_each_sample(folder: Path) -> None:
    (folder / "metadata.csv").write_text(CSV)
    dataset = VideoPromptDataset(folder, num_frames=5, frame_stride=2)
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate)
    checked = check_batch(batch)
    assert [None if p is None else len(p) for p in checked.reference] == [1, 2, None]
    assert checked.fps == (12.0, 12.0, 12.0)


def test_the_loader_brings_references_and_rows_without_a_video(folder: Path) -> None:
    """Load from a pickled copy of the dataset, as a worker process does."""
    (folder / "metadata.csv").write_text("video,prompt,reference\na.mp4,one,her\n,two,face.png\n")
    dataset = VideoPromptDataset(folder, num_frames=5, height=32, width=48, needs=NO_START)
    batch = check_batch(next(Batches(pickle.loads(pickle.dumps(dataset)), DataOrder(2, 2, seed=0), num_workers=0)))
    found = zip(batch.sample_id, batch.valid_frames, batch.reference, batch.fps, strict=True)
    assert {(name, frames, len(r), fps) for name, frames, r, fps in found if r is not None} == {
        ("a.mp4", 5, 2, 24.0),
        ("row-3", 0, 1, None),
    }


def test_what_nobody_needs_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a reference was read")

    (folder / "metadata.csv").write_text(CSV.replace("face.png", "gone.png"))
    for name in ("read_references", "check_references"):
        monkeypatch.setattr(dataset_module, name, read)
    dataset = VideoPromptDataset(folder, num_frames=5, needs=NOTHING_NEEDED)
    assert dataset.validate(deep=True) == []
    assert shades(dataset[0]) is None


BAD: dict[str, tuple[Any, str]] = {
    "gone": ("gone.png", "no such file"),
    "outside": ("../face.png", "allow_outside"),
    "in a list": (["face.png", "gone.png"], "no such file"),
    "outside in a list": (["face.png", "/etc/passwd"], "is outside"),
    "blank in a list": (["face.png", " "], "a name in the list is empty"),
    "number": (3, "must be text or a list of texts, not int"),
    "number in a list": ([3], "must be text or a list of texts, not int"),
    "no picture": ("text.txt", "cannot be read as a video"),
    "bare folder": ("bare", "contains no pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_references_are_listed_and_named(folder: Path, name: str) -> None:
    value, words = BAD[name]
    (folder / "text.txt").write_text("no picture\n" * 50)
    (folder / "bare").mkdir()
    records = [RECORDS[0], {"video": "a.mp4", "prompt": "two", "reference": value}]
    (folder / "metadata.json").write_text(json.dumps(records))
    dataset = VideoPromptDataset(folder, num_frames=5)
    for deep in (False, True):
        (bad,) = dataset.validate(deep)
        assert (bad.row, bad.field) == (2, "reference")
        assert words in bad.reason
    with pytest.raises(DataError, match=r"row 2 .* field 'reference': "):
        dataset[1]


def test_a_reference_that_is_replaced_is_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset_module._log_once.cache_clear()
    (folder / "metadata.csv").write_text(CSV)
    dataset = VideoPromptDataset(folder, num_frames=5)
    Image.new("RGB", (48, 48), (10, 10, 10)).save(folder / "face.png")
    assert shades(dataset[0]) == [10]
    assert f"{folder / 'face.png'}: replaced or changed since the run began" in caplog.text


@pytest.mark.parametrize(("column", "told"), [("references", True), ("Reference", True), ("preference", False)])
def test_a_column_that_is_nearly_called_so_is_told_of(
    folder: Path, column: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "metadata.csv").write_text(CSV.replace("reference", column, 1))
    with caplog.at_level(logging.WARNING):
        assert not any(row.reference for row in read_rows(folder / "metadata.csv", allow_outside=False))
    told_of = [record for record in caplog.records if "did you mean 'reference'?" in record.getMessage()]
    assert len(told_of) == told


def test_beside_a_video_of_a_folder(folder: Path, clip: Path) -> None:
    """Read `NAME.reference.png` and `NAME.reference/` as references; without a video NAME, they are samples."""
    (folder / "her").rename(folder / "a.reference")
    (folder / "face.png").rename(folder / "a.reference.png")
    (folder / "b.mp4").symlink_to(clip)
    (folder / "c.reference.mp4").symlink_to(clip)
    for name in ("a", "b", "c.reference"):
        (folder / f"{name}.txt").write_text(name)
    dataset = VideoPromptDataset(folder, num_frames=5)
    assert dataset.sample_ids == ("a.mp4", "b.mp4", "c.reference.mp4")
    assert [shades(dataset[index]) for index in range(3)] == [[100, 150, 200], None, None]
    assert dataset.validate() == []


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa person nods\r\n\r\n  a smile, müde  \n", encoding="utf-8")
    dataset = VideoPromptDataset(tmp_path / "prompts.txt", num_frames=9, height=32, width=64, needs=NOTHING_NEEDED)
    assert dataset.sample_ids == ("row-1", "row-3")
    assert dataset.validate(deep=True) == [] and dataset.check().short == []
    sample = dataset[1]
    assert (sample["prompt"], sample.get("valid_frames"), sample.get("fps")) == ("a smile, müde", 0, None)
    assert sample["video"].shape == (9, 3, 32, 64) and sample["video"].abs().max() == 0


def test_without_a_size_it_is_the_square_of_so_many_pixels(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a person nods")
    dataset = VideoPromptDataset(tmp_path / "prompts.txt", num_frames=5, max_pixels=60 * 80, needs=NOTHING_NEEDED)
    assert dataset[0]["video"].shape == (5, 3, 64, 64)


@pytest.mark.parametrize("name", ["no column", "blank", "null"])
def test_a_video_may_be_left_out(folder: Path, name: str) -> None:
    video = {"no column": {}, "blank": {"video": " "}, "null": {"video": None}}[name]
    records = [{**video, "prompt": "one", "reference": "her"}, {**video, "prompt": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = VideoPromptDataset(folder, num_frames=5, needs=NO_START)
    assert shades(dataset[0]) == [100, 150]
    (bad,) = dataset.validate()
    assert (bad.row, bad.field) == (2, "video")
    assert bad.reason.endswith(", but the reward face_identity needs a reference")
    with pytest.raises(DataError, match=r"row 2 .* needs a reference"):
        dataset[1]
    with pytest.raises(DataError, match=r"the model needs a first frame \(all 2 rows are invalid\)"):
        VideoPromptDataset(folder, num_frames=5)


def test_a_column_that_is_nearly_called_video_is_none_left_out(folder: Path) -> None:
    (folder / "metadata.csv").write_text("Video,prompt\na.mp4,one\n")
    with pytest.raises(DataError, match="did you mean 'Video'"):
        VideoPromptDataset(folder, num_frames=5, needs=NOTHING_NEEDED)


def test_a_picture_has_no_rate(folder: Path) -> None:
    (folder / "metadata.csv").write_text("video,prompt\nface.png,one\n")
    assert VideoPromptDataset(folder, num_frames=5)[0].get("fps") is None
