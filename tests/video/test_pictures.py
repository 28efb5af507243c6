"""Pictures and animations of every format: all frames, upright, with the right colours; otherwise an error says why."""

from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from corner_pictures import BLUE, GREEN, RED, WHITE, corner_colours, corners
from PIL import Image, ImageOps

from frostline.errors import DataError
from frostline.video import count_frames, probe_video, read_video, stream_video

pillow_heif.register_heif_opener()

# One frame for each level, so that frames can be distinguished by their brightness.
LEVELS = (40, 90, 140, 190)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_one_upright_frame(tmp_path: Path, orientation: int) -> None:
    """Compare with PIL's own EXIF transposition."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(corners(32, 64)).save(path, exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    video = read_video(path)
    assert video.shape == (1, 3, *expected.shape[:2])
    assert corner_colours(video) == corner_colours(torch.from_numpy(expected.copy()).permute(2, 0, 1)[None])
    info = probe_video(path)
    assert (info.frames, info.height, info.width, info.fps) == (1, *expected.shape[:2], 0.0)


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("second", ["mpf", "appended"])
def test_a_photo_with_a_second_picture_behind_it_is_one_frame(tmp_path: Path, second: str, size: int) -> None:
    """Phones append a gain map or a preview. FFmpeg reads small files of this kind as motion JPEG."""
    photo, gain = Image.fromarray(corners(size, size)), Image.fromarray(corners(size // 2, size // 2)).convert("L")
    path, behind = tmp_path / "a.jpg", tmp_path / "behind.jpg"
    if second == "mpf":
        photo.save(path, format="MPO", save_all=True, append_images=[gain])
    else:
        photo.save(path)
        gain.save(behind)
        path.write_bytes(path.read_bytes() + behind.read_bytes())
    video = read_video(path)
    assert video.shape == (1, 3, size, size)
    assert corner_colours(video) == [RED, GREEN, BLUE, WHITE]
    assert [number for number, _ in stream_video(path)] == [0]
    info = probe_video(path)
    assert (info.frames, info.height, info.width, info.fps) == (1, size, size, 0.0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_png_of_any_mode_is_rgb(tmp_path: Path, mode: str) -> None:
    picture = np.full((17, 33), 200, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(picture.astype(np.uint16) * 257)
    else:
        colour = Image.fromarray(np.stack([picture] * 3, -1))
        image = colour.quantize() if mode == "P" else colour.convert(mode)
    path = tmp_path / "frame%03d.png"  # the name must not be read as a number pattern
    image.save(path)
    video = read_video(path)
    assert video.shape == (1, 3, 17, 33)
    assert (video.int() - 200).abs().max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif", "heic"])
@pytest.mark.parametrize("orientation", [1, 2, 6])
def test_pictures_of_every_format_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = {1: [RED, GREEN, BLUE, WHITE], 2: [GREEN, RED, WHITE, BLUE], 6: [BLUE, RED, WHITE, GREEN]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(corners(32, 64)).save(path, exif=exif.tobytes() if suffix in ("webp", "heic") else exif, quality=95)
    video = read_video(path)
    assert video.shape == ((1, 3, 64, 32) if orientation == 6 else (1, 3, 32, 64))
    assert corner_colours(video) == upright[orientation]
    info = probe_video(path)
    assert (info.frames, info.height, info.width, info.fps) == (1, *video.shape[2:], 0.0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "avif", "png"])
def test_an_animation_is_all_of_its_frames(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (48, 32), (level,) * 3) for level in LEVELS]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=62)
    video = read_video(path)
    assert video.shape == (4, 3, 32, 48)
    assert (video.float().mean(dim=(1, 2, 3)) - torch.tensor(LEVELS)).abs().max() < 4
    assert [number for number, _ in stream_video(path, stride=2)] == [0, 2]
    info = probe_video(path)
    assert (info.frames, info.width, info.height) == (4, 48, 32) and info.fps == pytest.approx(16, abs=1)
    assert (count_frames(path, 3), count_frames(path, 9)) == (3, 4)


def test_the_stand_in_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    stand_in, *frames = (Image.new("RGB", (48, 32), (level,) * 3) for level in LEVELS)
    stand_in.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True)
    means = read_video(tmp_path / "a.png").float().mean(dim=(1, 2, 3))
    assert means.tolist() == pytest.approx(LEVELS[1:])


def test_a_picture_in_tiles_is_read_whole(tmp_path: Path) -> None:
    """Read a picture in tiles, as phones store it; a video reader returns only the first tile."""
    picture = corners(128, 256)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "a.heic", quality=95, tile_size=64)
    assert b"grid" in (tmp_path / "a.heic").read_bytes()
    video = read_video(tmp_path / "a.heic")
    assert video.shape == (1, 3, 128, 256)
    assert corner_colours(video) == [RED, GREEN, BLUE, WHITE]


def test_of_several_pictures_in_one_file_the_choice_is_told(tmp_path: Path) -> None:
    """Read one picture: pages of a TIFF and views of a HEIC are not frames of a clip."""
    pages = [Image.new("RGB", (48, 32), (level,) * 3) for level in LEVELS]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    views = pillow_heif.HeifFile()
    for page in pages:
        views.add_from_pillow(page)
    views.save(tmp_path / "a.heic", primary_index=2, quality=95)
    for name, level, said in (
        ("a.tif", LEVELS[0], "using the first one of its 4 pictures"),
        ("a.heic", LEVELS[2], "using the primary one of its 4 pictures"),
    ):
        notes: list[str] = []
        ((_, picture),) = stream_video(tmp_path / name, warn=notes.append)
        assert picture.mean() == pytest.approx(level, abs=3) and notes == [said]


def test_compressed_tiff_keeps_its_picture(tmp_path: Path) -> None:
    for compression in ("jpeg", "tiff_lzw", "tiff_deflate"):
        path = tmp_path / f"{compression}.tif"
        Image.fromarray(corners(64, 64)).save(path, compression=compression)
        assert corner_colours(read_video(path)) == [RED, GREEN, BLUE, WHITE]


def test_an_animation_that_is_cut_off_gives_its_good_frames(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    frames = [Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(8)]
    path = tmp_path / "a.png"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    notes: list[str] = []
    read = list(stream_video(path, warn=notes.append))
    assert 1 <= len(read) < 8
    (note,) = notes
    assert note.startswith(f"only {len(read)} of its 8 frames can be decoded (cannot be read as a PNG picture: ")


def _float_tiff(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.float32)).save(path, format="TIFF")


def _thumbnail_first(path: Path) -> None:
    """Write a file that starts like raw files of cameras."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[254] = 1
    Image.fromarray(corners(32, 64)).save(path, format="TIFF", tiffinfo=tags)


def _cut_jpeg(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:900])


def _jpeg_xl(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40))


UNREADABLE = {
    "float": (_float_tiff, "its pixels are floating-point numbers"),
    "raw": (_thumbnail_first, "it only contains a thumbnail, like a camera's raw file"),
    "cut": (_cut_jpeg, "cannot be read as a JPEG picture: image file is truncated"),
    "heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200)), "cannot be read as a HEIF picture"),
    "jpeg_xl": (_jpeg_xl, "it is a JPEG XL picture"),
    "page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>sign in</html>"), "it is a web page"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("reader", [read_video, probe_video])
def test_what_cannot_be_read_is_named_as_what_it_is(tmp_path: Path, name: str, reader) -> None:
    make, reason = UNREADABLE[name]
    path = tmp_path / f"{name}.jpg"
    make(path)
    with pytest.raises(DataError, match=f"^{path}: ") as caught:
        reader(path)
    assert reason in str(caught.value)
