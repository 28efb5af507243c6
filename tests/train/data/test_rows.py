"""The rows of a folder or a table: nothing is skipped, added or followed silently."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from frostline.errors import DataError
from frostline.train.data.dataset import VideoPromptDataset
from frostline.video import MEDIA_SUFFIXES, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = torch.full((5, 3, 32, 32), 90, dtype=torch.uint8)
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames, lossless=True)


def captioned(clip: Path, place: Path, caption: str = "a person") -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(clip, place)
    place.with_suffix(".txt").write_text(caption)
    return place


@pytest.mark.parametrize("suffix", ["flv", "wmv", "3gp", "mts", "ogv", "MKV", "webm", "avif", "heic"])
def test_files_of_every_kind_are_found(tmp_path: Path, suffix: str, clip: Path) -> None:
    captioned(clip, tmp_path / f"a.{suffix}")
    assert VideoPromptDataset(tmp_path).sample_ids == (f"a.{suffix}",)


def test_pictures_of_phones_are_samples(tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.from_pillow(Image.new("RGB", (48, 32), (90, 90, 90))).save(tmp_path / "a.heic")
    (tmp_path / "a.txt").write_text("a person")
    sample = VideoPromptDataset(tmp_path, num_frames=5)[0]
    assert sample["video"].shape == (5, 3, 32, 48) and sample.get("valid_frames") == 1


def test_hidden_files_are_left_out(tmp_path: Path, clip: Path) -> None:
    for name in ("a.mp4", "._a.mp4", ".ipynb_checkpoints/a-checkpoint.mp4", "sub/.thumbnails/b.mp4", "sub/b.mp4"):
        captioned(clip, tmp_path / name)
    assert VideoPromptDataset(tmp_path).sample_ids == ("a.mp4", "sub/b.mp4")


def test_what_is_left_out_is_told(tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    captioned(clip, tmp_path / "a.mp4")
    for name in ("b.mp5", "c.mp5", "LICENSE"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO):
        assert len(VideoPromptDataset(tmp_path)) == 1
    assert "suffix is not that of a video or picture: 2 .mp5, 1 LICENSE" in caplog.text


def test_links_to_folders_are_followed_once(tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Test also links that form a circle."""
    data, real = tmp_path / "data", tmp_path / "data" / "real"
    captioned(clip, real / "a.mp4")
    (data / "again").symlink_to(real)
    (real / "up").symlink_to(data)
    assert VideoPromptDataset(data).sample_ids == ("again/a.mp4",)
    assert "data/real: skipped, because it is a link" in caplog.text


def test_links_may_lead_outside_only_where_that_is_allowed(tmp_path: Path, clip: Path) -> None:
    """Refuse them by default: a folder from someone else could use any text file of the user as a prompt."""
    data, secret = tmp_path / "data", tmp_path / "secret.txt"
    secret.write_text("the password")
    captioned(clip, data / "a.mp4").with_suffix(".txt").unlink()
    (data / "a.txt").symlink_to(secret)
    captioned(clip, tmp_path / "elsewhere" / "b.mp4")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    # Videos and captions in the folder may be links, as in a download cache.
    captioned(clip, data / "c.mp4").unlink()
    (data / "c.mp4").symlink_to(clip)
    (data / "d.txt").symlink_to(data / "c.txt")
    (data / "d.mp4").symlink_to(clip)
    bad = VideoPromptDataset(data).validate()
    assert [row.sample_id for row in bad] == ["a.mp4", "linked/b.mp4"]
    assert all("leads outside of" in row.reason and "allow_outside=True" in row.reason for row in bad)
    assert not any("password" in row.reason for row in bad)
    allowed = VideoPromptDataset(data, allow_outside=True)
    assert allowed.validate() == [] and allowed[0]["prompt"] == "the password"


@pytest.mark.timeout(30)
def test_named_pipes_are_refused_and_do_not_hang(tmp_path: Path, clip: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        captioned(clip, tmp_path / name)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.mp4").unlink()
    os.mkfifo(tmp_path / "b.mp4")
    bad = VideoPromptDataset(tmp_path).validate()
    assert [(row.sample_id, row.field) for row in bad] == [("a.mp4", "prompt"), ("b.mp4", "video")]
    assert all("not a regular file" in row.reason for row in bad)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"pipe\.csv: not a regular file"):
        VideoPromptDataset(tmp_path / "pipe.csv")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(clip, tmp_path / "closed" / "a.mp4")
    scan = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="closed: the folder cannot be read: Permission denied"):
        VideoPromptDataset(tmp_path)


def test_rows_that_a_spreadsheet_leaves_are_none(tmp_path: Path, clip: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clip, tmp_path / name)
    text = 'video,prompt,,\r\na.mp4,"one, two",,\r\n,,,\r\n" ",,,\r\nb.mp4,three,,,,\r\n,,,,,\r\n'
    (tmp_path / "metadata.csv").write_text(text, newline="")
    dataset = VideoPromptDataset(tmp_path)
    assert dataset.sample_ids == ("a.mp4", "b.mp4")
    assert dataset.validate() == []
    # A row that names a video or has a text counts, also one with more cells than the header.
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mp4,one\n,two\n,,three\n")
    assert [(row.row, row.field) for row in VideoPromptDataset(tmp_path).validate()] == [(3, "video"), (4, "row")]


def test_what_a_folder_is_searched_for() -> None:
    assert {".mp4", ".mkv", ".webm", ".flv", ".wmv", ".3gp", ".mts", ".ogv", ".avif", ".heic"} <= MEDIA_SUFFIXES
    assert ".txt" not in MEDIA_SUFFIXES and "" not in MEDIA_SUFFIXES
