"""Training data: metadata of every format is read, and every invalid row is named."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from video_files import encode

from frostline.errors import ConfigError, DataError
from frostline.models.video_shape import Geometry
from frostline.train.data import dataset as data_module
from frostline.train.data.batch import check_batch
from frostline.train.data.cutting import size_within
from frostline.train.data.dataset import VideoPromptDataset, collate
from frostline.video import write_video

# The geometry of a model with the VAE of Wan2.2 TI2V.
LARGER = Geometry(4, 16, 32)
ROWS = [("a.mp4", "a person talking"), ("sub/b.mp4", 'she says "hi", then nods'), ("c.mp4", "ein Gesicht, müde")]


def noise_video(seed: int, frames: int = 9, height: int = 40, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the videos of ROWS, without metadata."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, _) in enumerate(ROWS):
        write_video(folder / name, noise_video(seed), lossless=True)
    return folder


@pytest.fixture
def folder(videos: Path, tmp_path: Path) -> Path:
    """Return a new folder with links to the videos, like a download cache."""
    (tmp_path / "sub").mkdir()
    for name, _ in ROWS:
        (tmp_path / name).symlink_to(videos / name)
    return tmp_path


def csv_text(rows: list[tuple[str, str]], header: str = "video,prompt") -> str:
    quoted = [",".join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
    return "\n".join([header, *quoted]) + "\n"


def write_metadata(folder: Path, kind: str, rows: list[tuple[str, str]]) -> Path:
    """Write metadata in one format, with a byte order mark, like spreadsheet programs; return the path."""
    records = [{"video": video, "prompt": prompt} for video, prompt in rows]
    text = {
        "csv": csv_text(rows),
        "json": json.dumps(records, ensure_ascii=False),
        "jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
    }[kind]
    path = folder / f"metadata.{kind}"
    path.write_text(text, encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_metadata_of_every_kind(folder: Path, kind: str) -> None:
    path = write_metadata(folder, kind, ROWS)
    for source in (path, folder, str(path)):
        dataset = VideoPromptDataset(source, num_frames=5, height=32, width=64)
        assert len(dataset) == 3
        assert dataset.sample_ids == ("a.mp4", "sub/b.mp4", "c.mp4")
        assert dataset.validate() == dataset.validate(deep=True) == []
    samples = [dataset[index] for index in range(3)]
    assert [sample["prompt"] for sample in samples] == [prompt for _, prompt in ROWS]
    for seed, sample in enumerate(samples):
        assert sample["video"].dtype == torch.float32
        # Only the height is cropped, by four rows at top and bottom, so the pixels are those of the file.
        assert torch.equal(sample["video"], noise_video(seed)[:5, :, 4:36].float() / 255)
    assert torch.equal(dataset[-1]["video"], samples[2]["video"])
    with pytest.raises(IndexError):
        dataset[3]


def test_folder_with_captions(folder: Path) -> None:
    for name, prompt in ROWS:
        (folder / name).with_suffix(".txt").write_text(f"\ufeff{prompt}\n", encoding="utf-8")
    dataset = VideoPromptDataset(folder, num_frames=5)
    assert dataset.sample_ids == ("a.mp4", "c.mp4", "sub/b.mp4")
    assert dataset[2]["prompt"] == ROWS[1][1]
    assert dataset[2]["video"].shape == (5, 3, 32, 64)


def test_collate_makes_a_batch_that_passes_the_contract(folder: Path) -> None:
    dataset = VideoPromptDataset(write_metadata(folder, "csv", ROWS), num_frames=5, height=32, width=48)
    # Pickled, as for a worker process of a run (test_train_cli.py tests a real one).
    (batch,) = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=3, collate_fn=collate)
    assert batch["video"].shape == (3, 5, 3, 32, 48)
    checked = check_batch(batch)
    assert checked.sample_id == dataset.sample_ids
    assert torch.equal(checked.video[1], dataset[1]["video"])


def test_collate_names_samples_of_unequal_size(folder: Path) -> None:
    write_video(folder / "small.mp4", noise_video(0, 5, 16, 16), lossless=True)
    rows = [ROWS[0], ("small.mp4", "small")]
    dataset = VideoPromptDataset(write_metadata(folder, "csv", rows), num_frames=5)
    with pytest.raises(DataError, match=r"sample small\.mp4, field 'video'.*a\.mp4; set height and width"):
        collate([dataset[0], dataset[1]])


def test_short_videos_repeat_their_last_frame(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_module._log_once.cache_clear()
    dataset = VideoPromptDataset(write_metadata(folder, "csv", ROWS), num_frames=13, height=32, width=64)
    with caplog.at_level(logging.WARNING):
        sample = dataset[0]
        dataset[0]
    video = sample["video"]
    assert torch.equal(video[:9], noise_video(0)[:, :, 4:36].float() / 255)
    assert all(torch.equal(frame, video[8]) for frame in video[9:])
    assert [record.getMessage() for record in caplog.records] == [
        "sample a.mp4: 9 frames, padded to 13 by repeating the last"
    ]
    assert collate([sample, dataset[1]])["valid_frames"] == [9, 9]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("deep", [False, True])
def test_short_clips_are_counted(tmp_path: Path, suffix: str, deep: bool) -> None:
    """Test also a container that does not state the number of frames."""
    for frames in (4, 5, 9, 10):
        path = write_video(tmp_path / "video.mp4", noise_video(0, frames), lossless=True)
        if suffix == "mp4":
            path.rename(tmp_path / f"{frames}.mp4")
        else:
            encode(tmp_path / f"{frames}.mkv", list(noise_video(0, frames).permute(0, 2, 3, 1).numpy()))
    rows = [(f"{frames}.{suffix}", "p") for frames in (4, 5, 9, 10)]
    path = write_metadata(tmp_path, "csv", [*rows, ("gone.mp4", "p")])
    for stride, short in ((1, [f"4.{suffix}"]), (2, [f"4.{suffix}", f"5.{suffix}"])):
        dataset = VideoPromptDataset(path, num_frames=5, frame_stride=stride)
        check = dataset.check(deep)
        assert check.short == short
        assert [row.sample_id for row in check.bad] == ["gone.mp4"]
        assert check.sizes == {tuple(noise_video(0, 1).shape[-2:])}
        assert dataset.describe_padding(short).startswith(f"{len(short)} of 5 clips have fewer than 5 frames")


def test_a_file_that_is_replaced_is_told_of_once(folder: Path, videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_module._log_once.cache_clear()
    (folder / "a.mp4").unlink()
    shutil.copy(videos / "a.mp4", folder / "a.mp4")
    dataset = VideoPromptDataset(write_metadata(folder, "csv", ROWS), num_frames=5)
    dataset[0]
    assert caplog.text == ""
    before = (folder / "a.mp4").stat()
    shutil.copy(videos / "c.mp4", folder / "a.mp4")
    os.utime(folder / "a.mp4", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for _ in range(2):
        assert torch.equal(dataset[0]["video"], dataset[2]["video"])
    (record,) = caplog.records
    assert record.getMessage() == f"{folder / 'a.mp4'}: replaced or changed since the run began; using the new content"


def test_frame_stride(folder: Path) -> None:
    path = write_metadata(folder, "csv", ROWS)
    dataset = VideoPromptDataset(path, num_frames=5, height=32, width=64, frame_stride=2)
    assert torch.equal(dataset[0]["video"], noise_video(0)[::2, :, 4:36].float() / 255)


def test_resizing_covers_and_crops_the_centre(tmp_path: Path) -> None:
    """Crop a picture of three vertical bands to a square: only the middle band is left."""
    frames = torch.zeros(1, 3, 64, 192, dtype=torch.uint8)
    for channel in range(3):
        frames[:, channel, :, channel * 64 : channel * 64 + 64] = 255
    write_video(tmp_path / "bands.mp4", frames, lossless=True)
    path = write_metadata(tmp_path, "csv", [("bands.mp4", "three bands")])
    video = VideoPromptDataset(path, num_frames=1, height=32, width=32)[0]["video"]
    assert video.shape == (1, 3, 32, 32)
    torch.testing.assert_close(video[:, 1, :, 2:-2], torch.ones(1, 32, 28))
    assert video[:, [0, 2], :, 2:-2].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((480, 832), 480 * 832, (480, 832)),
        ((1080, 1920), 480 * 832, (464, 832)),
        ((1920, 1080), 480 * 480, (640, 352)),
        ((40, 64), 480 * 832, (32, 64)),
        ((8, 8), 480 * 832, (16, 16)),
        ((96, 96), 64 * 64, (64, 64)),
    ],
)
def test_size_within(size: tuple[int, int], max_pixels: int, expected: tuple[int, int]) -> None:
    assert size_within(*size, max_pixels) == expected


def test_sides_are_multiples_of_what_the_model_takes(folder: Path) -> None:
    assert size_within(1080, 1920, 704 * 1280, 32) == (704, 1248)
    path = write_metadata(folder, "csv", ROWS)
    assert VideoPromptDataset(path, num_frames=1, geometry=LARGER)[0]["video"].shape[-2:] == (32, 64)
    with pytest.raises(ConfigError, match="height must be a multiple of 32, not 48"):
        VideoPromptDataset(path, height=48, width=64, geometry=LARGER)
    with pytest.raises(ConfigError, match="max_pixels must be at least 1024"):
        VideoPromptDataset(path, max_pixels=512, geometry=LARGER)


def test_paths_from_the_file_stay_in_its_folder(folder: Path, videos: Path) -> None:
    outside = str(videos / "a.mp4")
    climbing = f"../{videos.name}/a.mp4"
    rows = [
        ("a.mp4", "p"),
        (outside, "p"),
        ("sub/../../x.mp4", "p"),
        (str(folder / "c.mp4"), "p"),
        ("sub/../c.mp4", "p"),
    ]
    path = write_metadata(folder, "csv", rows)
    bad = VideoPromptDataset(path).validate()
    assert [row.row for row in bad] == [3, 4]
    assert all(row.field == "video" and "allow_outside" in row.reason for row in bad)
    path = write_metadata(videos, "csv", [(climbing, "p"), (outside, "p")])
    assert VideoPromptDataset(path, allow_outside=True).validate() == []
    path.unlink()


def test_repeated_videos_have_names_of_their_own(folder: Path) -> None:
    dataset = VideoPromptDataset(write_metadata(folder, "csv", [("a.mp4", "one"), ("a.mp4", "two"), ROWS[2]]))
    assert dataset.sample_ids == ("a.mp4#2", "a.mp4#3", "c.mp4")


# One invalid row each, next to a valid one: (row of metadata.jsonl, field, part of the reason).
BAD_ROWS: dict[str, tuple[object, str, str]] = {
    "missing file": ({"video": "gone.mp4", "prompt": "p"}, "video", "no such file"),
    "a folder": ({"video": "sub", "prompt": "p"}, "video", "not a regular file"),
    "zero bytes": ({"video": "empty.mp4", "prompt": "p"}, "video", "empty (0 bytes)"),
    "text": ({"video": "text.mp4", "prompt": "p"}, "video", "cannot be read as a video"),
    "url": ({"video": "http://localhost/a.mp4", "prompt": "p"}, "video", "is outside"),
    "protocol": ({"video": "concat:a.mp4|c.mp4", "prompt": "p"}, "video", "no such file"),
    "NUL": ({"video": "a\0.mp4", "prompt": "p"}, "video", "NUL"),
    "long name": ({"video": "a" * 5000, "prompt": "p"}, "video", "too long"),
    "outside": ({"video": "/etc/passwd", "prompt": "p"}, "video", "is outside"),
    "climbing": ({"video": "../a.mp4", "prompt": "p"}, "video", "is outside"),
    "empty prompt": ({"video": "a.mp4", "prompt": ""}, "prompt", "is empty"),
    "blank prompt": ({"video": "a.mp4", "prompt": " \t"}, "prompt", "is empty"),
    "null prompt": ({"video": "a.mp4", "prompt": None}, "prompt", "is empty"),
    "number prompt": ({"video": "a.mp4", "prompt": 3}, "prompt", "must be text, not int"),
    "list video": ({"video": ["a.mp4"], "prompt": "p"}, "video", "must be text, not list"),
    "empty video": ({"video": "", "prompt": "p"}, "video", "is empty"),
    "promt": ({"video": "a.mp4", "promt": "p"}, "prompt", "did you mean 'promt'?"),
    "Video": ({"Video": "a.mp4", "prompt": "p"}, "video", "did you mean 'Video'?"),
    "caption": ({"video": "a.mp4", "caption": "p"}, "prompt", "found 'video', 'caption'"),
    "half a character": ({"video": "a.mp4", "prompt": "a smile \ud83d"}, "prompt", "lone surrogate"),
    "no file name": ({"video": "a\ud800.mp4", "prompt": "p"}, "video", "that file names cannot have"),
    "a list": (["a.mp4", "p"], "row", "must be an object"),
    "an empty object": ({}, "video", "found nothing"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_listed_and_named(folder: Path, name: str) -> None:
    record, field, fragment = BAD_ROWS[name]
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 50)
    path = folder / "metadata.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "prompt": "good"}) + "\n\n" + json.dumps(record) + "\n")
    dataset = VideoPromptDataset(path, num_frames=5)
    (bad,) = dataset.validate()
    assert (bad.file, bad.row, bad.field) == (path, 3, field)
    assert bad.sample_id == dataset.sample_ids[1]
    assert fragment in bad.reason
    with pytest.raises(DataError) as caught:
        dataset[1]
    for part in (str(path), "row 3", bad.sample_id, f"field '{field}'", fragment):
        assert part in str(caught.value)
    assert dataset[0]["prompt"] == "good"


def test_folder_rows_without_caption(folder: Path) -> None:
    (folder / "a.txt").write_text("good")
    (folder / "c.txt").write_text(" \n")
    bad = VideoPromptDataset(folder).validate()
    assert [(row.row, row.sample_id, row.field) for row in bad] == [(2, "c.mp4", "prompt"), (3, "sub/b.mp4", "prompt")]
    assert "c.txt is empty" in bad[0].reason
    assert "no caption file b.txt" in bad[1].reason
    (folder / "c.txt").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in VideoPromptDataset(folder).validate()[0].reason


# Invalid files: (name, content, parts of the message).
BAD_FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("m.csv", b"", ["is empty"]),
    "only a mark": ("m.csv", b"\xef\xbb\xbf\n", ["is empty"]),
    "only a header": ("m.csv", b"video,prompt\n", ["contains no rows"]),
    "empty list": ("m.json", b"[]", ["contains no rows"]),
    "wrong header": ("m.csv", b"video,promt\na.mp4,hello\n", ["row 2", "a.mp4", "'prompt'", "did you mean 'promt'?"]),
    "no header": ("m.csv", b"a.mp4,hello\nc.mp4,you\n", ["row 2", "'video'", "is missing"]),
    "semicolons": ("m.csv", b"video;prompt\na.mp4;hello\n", ["row 2", "'video'", "found 'video;prompt'"]),
    "commas": ("m.csv", b"video,prompt\na.mp4,she nods, then smiles\n", ["row 2", "a.mp4", "quote a prompt"]),
    "open quote": ("m.csv", b'video,prompt\na.mp4,"hello\n', ["row 2", "csv"]),
    "latin-1": ("m.csv", b"video,prompt\na.mp4,m\xfcde\n", ["not UTF-8", "byte 20"]),
    "broken json": ("m.json", b'[{"video": "a.mp4", ]', ["invalid JSON"]),
    "deep json": ("m.json", b"[" * 100_000, ["invalid JSON"]),
    "json object": ("m.json", b'{"video": "a.mp4"}', ["must be a list"]),
    "broken jsonl": ("m.jsonl", b'{"video": "a.mp4", "prompt": "p"}\n{"video"\n', ["row 2", "JSON"]),
    "all rows bad": ("m.jsonl", b'{"video": "a.mp4"}\n', ["row 1", "'prompt'", "all 1 rows are invalid"]),
    "yaml": ("m.yaml", b"video: a.mp4", [".csv, .jsonl or .json", ".txt"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_metadata_files_are_refused(tmp_path: Path, name: str) -> None:
    filename, content, fragments = BAD_FILES[name]
    path = tmp_path / filename
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        VideoPromptDataset(path)
    for fragment in [str(path), *fragments]:
        assert fragment in str(caught.value)


def test_bad_sources_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        VideoPromptDataset(folder / "gone.csv")
    with pytest.raises(DataError, match="contains no rows"):
        VideoPromptDataset(tmp_path_factory.mktemp("bare"))
    write_metadata(folder, "csv", ROWS)
    write_metadata(folder, "json", ROWS)
    with pytest.raises(DataError, match=r"metadata\.csv and metadata\.json; name the one"):
        VideoPromptDataset(folder)


def test_csv_rows_are_counted_in_lines(folder: Path) -> None:
    path = folder / "metadata.csv"
    path.write_text('video,prompt\n\na.mp4,"two\nlines"\n\ngone.mp4,"three\n\nlines"\nc.mp4,\n')
    dataset = VideoPromptDataset(path)
    assert dataset[0]["prompt"] == "two\nlines"
    assert [(row.row, row.sample_id) for row in dataset.validate()] == [(6, "gone.mp4"), (9, "c.mp4")]


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"num_frames": 16}, "num_frames must be 4k+1"),
        ({"num_frames": -3}, "num_frames"),
        ({"height": 32}, "must be set together"),
        ({"height": 32, "width": 40}, "width must be a multiple of 16"),
        ({"height": 0, "width": 32}, "height must be a multiple of 16"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"frame_stride": 0}, "frame_stride"),
    ],
)
def test_bad_settings_are_refused(folder: Path, settings: dict[str, int], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VideoPromptDataset(write_metadata(folder, "csv", ROWS), **settings)
    assert fragment in str(caught.value)


def test_deep_validation_finds_what_the_first_frame_hides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unequal(path: Path, *_: object) -> Iterator[None]:
        raise DataError(f"{path}: frames differ in size")

    monkeypatch.setattr(data_module, "equal_frames", unequal)
    dataset = VideoPromptDataset(write_metadata(folder, "csv", ROWS))
    assert dataset.validate() == []
    assert [row.reason.endswith("differ in size") for row in dataset.validate(deep=True)] == [True] * 3
