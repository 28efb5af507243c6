"""Reference pictures: files, folders and videos become one tensor, with whole pictures and a limit on their number."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frostline.errors import DataError
from frostline.train.data import references as references_module
from frostline.train.data.references import MAX_PICTURES, MAX_SIDE, check_references, read_references
from frostline.video import write_video


def picture(path: Path, height: int = 32, width: int = 48, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


def grey_clip(path: Path, frames: int) -> Path:
    """Write a clip whose frame i has the grey level i / 255."""
    shades = torch.arange(frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    return write_video(path, shades.contiguous(), lossless=True)


def read(*paths: Path) -> tuple[torch.Tensor, list[str]]:
    notes: list[str] = []
    return read_references(paths, notes.append), notes


def test_pictures_of_one_size_are_the_files_own_pixels(tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    found, notes = read(*files)
    assert found.dtype == torch.float32 and notes == []
    assert torch.equal(found, torch.stack([pixels_of(file) for file in files]))


def test_of_a_folder_the_pictures_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = [picture(tmp_path / "her" / name, seed=seed) for seed, name in enumerate(("b.png", "a.png"))]
    picture(tmp_path / "her" / ".hidden.png", seed=7)
    picture(tmp_path / "her" / "deeper" / "c.png", seed=8)
    (tmp_path / "her" / "notes.txt").write_text("no picture")
    found, _ = read(tmp_path / "her")
    assert torch.equal(found, torch.stack([pixels_of(file) for file in reversed(files)]))


def test_other_sizes_are_fitted_inside_and_keep_their_proportions(tmp_path: Path) -> None:
    """Keep the aspect ratio of a white rectangle on black; repeat the border around the picture."""
    tall = np.zeros((64, 32, 3), dtype=np.uint8)
    tall[16:48, 8:24] = 255
    Image.fromarray(tall).save(tmp_path / "tall.png")
    wide = picture(tmp_path / "wide.png", 32, 128)
    small = np.zeros((16, 32, 3), dtype=np.uint8)
    small[4:12, 8:24] = 255
    Image.fromarray(small).save(tmp_path / "small.png")
    found, _ = read(tmp_path / "tall.png", wide, tmp_path / "small.png")
    assert found.shape == (3, 3, 64, 128)
    assert torch.equal(found[0, :, :, 48:80], pixels_of(tmp_path / "tall.png"))
    assert found[0, :, :, :48].max() == 0 and found[0, :, :, 80:].max() == 0
    assert torch.equal(found[1, :, 16:48], pixels_of(wide))
    assert torch.equal(found[1, :, :16], found[1, :, 16:17].expand(-1, 16, -1))
    # The small picture is enlarged four times.
    assert found[2].mean().item() == pytest.approx(0.25, abs=0.01)
    assert found[2, :, 20:44, 40:88].min() == 1


def test_photos_of_phones_are_turned_upright(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    upright = pixels_of(path)
    for orientation, expected in ((3, upright.flip(1, 2)), (6, upright.transpose(1, 2).flip(2))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(tmp_path / "b.png", exif=exif)
        found, _ = read(tmp_path / "b.png")
        assert torch.equal(found[0], expected)


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    found, _ = read(picture(tmp_path / "a.png", 2 * MAX_SIDE, 100))
    assert found.shape == (1, 3, MAX_SIDE, 50)


def test_a_video_gives_frames_from_all_of_it(tmp_path: Path) -> None:
    found, _ = read(grey_clip(tmp_path / "short.mp4", 5))
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4], "the first frame must be included"
    found, _ = read(grey_clip(tmp_path / "long.mp4", 40))
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [*range(0, 40, 3)]
    assert len(found) <= MAX_PICTURES


def test_of_a_long_video_the_end_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references_module, "MAX_VIDEO_FRAMES", 20)
    found, _ = read(grey_clip(tmp_path / "a.mp4", 100))
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [*range(0, 20, 2)]


def test_several_files_share_the_places(tmp_path: Path) -> None:
    found, notes = read(grey_clip(tmp_path / "a.mp4", 40), picture(tmp_path / "b.png", 16, 16))
    assert (found[:-1, 0, 0, 0] * 255).round().tolist() == [*range(0, 40, 5)]
    assert len(found) == 9 and notes == []
    many = [picture(tmp_path / "many" / f"{seed:02}.png", 16, 16, seed) for seed in range(40)]
    found, notes = read(tmp_path / "many")
    assert notes == ["using 16 of its 40 reference pictures, evenly selected"]
    assert torch.equal(found, torch.stack([pixels_of(many[index * 40 // 16]) for index in range(16)]))


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_wrong_is_named(tmp_path: Path, deep: bool) -> None:
    picture(tmp_path / "thin.png", 8, 100)
    (tmp_path / "empty.png").touch()
    (tmp_path / "bare").mkdir()
    good = picture(tmp_path / "good.png")
    check_references([good], deep)
    for name, words in (
        ("gone.png", "no such file"),
        ("empty.png", "is empty"),
        ("bare", "bare: the folder contains no pictures"),
        ("thin.png", "thin.png: a picture of 100x8 is too small: each side must have at least 16 pixels"),
    ):
        with pytest.raises(DataError, match=words):
            check_references([good, tmp_path / name], deep)
        with pytest.raises(DataError, match=words):
            read(good, tmp_path / name)
