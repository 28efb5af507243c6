"""Video files: what is written is read back, and every broken file is told apart."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from video_files import audio_only, encode, no_frames

from frostline.errors import ConfigError, DataError
from frostline.video import VideoInfo, probe_video, read_video, stream_video, write_video

# The corners of a picture, by which a turned or mirrored one is recognised.
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(height: int, width: int) -> np.ndarray:
    """A uint8 `(H, W, 3)` picture: red, green over blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, : width // 2] = BLUE
    picture[height // 2 :, width // 2 :] = WHITE
    return picture


def smooth_video(frames: int = 5, height: int = 48, width: int = 64) -> torch.Tensor:
    """uint8 `(T, 3, H, W)`: a slow colour gradient that changes a little from frame to frame."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pictures = [torch.stack([x, y, torch.full_like(x, t / frames)]) for t in range(frames)]
    return (torch.stack(pictures) * 255).round().to(torch.uint8)


def corner_colours(video: torch.Tensor) -> list[tuple[int, ...]]:
    """The colours at the four corners of the first frame, rounded to 0 or 255: top left, right, bottom left, right."""
    frame = (video[0] > 127).to(torch.uint8) * 255
    return [tuple(frame[:, y, x].tolist()) for y in (2, -3) for x in (2, -3)]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (16, 16)])
def test_lossless_reads_back_bit_for_bit(tmp_path: Path, height: int, width: int) -> None:
    video = smooth_video(5, height, width)
    path = write_video(tmp_path / "deep" / "a.mp4", video, fps=8, lossless=True)
    assert torch.equal(read_video(path), video)
    assert probe_video(path) == VideoInfo(5, width, height, 8.0, 0.625, 0)
    assert [item.name for item in path.parent.iterdir()] == ["a.mp4"]


def test_lossy_keeps_colours_and_pads_odd_sizes(tmp_path: Path) -> None:
    video = smooth_video(5, 47, 63)
    read = read_video(write_video(tmp_path / "a.mp4", video.float() / 255))
    assert read.shape == (5, 3, 48, 64)
    assert read.dtype == torch.uint8
    error = (read[..., :47, :63].float() - video.float()).abs()
    assert error.mean() < 2.5, error.mean()


def test_frames_are_chosen_by_stride_and_count(tmp_path: Path) -> None:
    video = smooth_video(11)
    path = write_video(tmp_path / "a.mp4", video, lossless=True)
    assert torch.equal(read_video(path, max_frames=3), video[:3])
    assert torch.equal(read_video(path, max_frames=3, stride=4), video[[0, 4, 8]])
    assert torch.equal(read_video(path, stride=5), video[::5])
    assert torch.equal(read_video(path, max_frames=1), video[:1])
    for arguments in ({"stride": 0}, {"max_frames": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            read_video(path, **arguments)


@pytest.mark.parametrize(
    ("rotation", "hflip", "expected"),
    [
        (0, False, [RED, GREEN, BLUE, WHITE]),
        (90, False, [GREEN, WHITE, RED, BLUE]),
        (180, False, [WHITE, BLUE, GREEN, RED]),
        (-90, False, [BLUE, RED, WHITE, GREEN]),
        (0, True, [GREEN, RED, WHITE, BLUE]),
    ],
)
def test_display_matrix_is_applied(tmp_path: Path, rotation: int, hflip: bool, expected: list[tuple[int, ...]]) -> None:
    path = encode(tmp_path / "a.mp4", [corners(32, 64)] * 2, rotation=rotation, hflip=hflip)
    video = read_video(path)
    assert video.shape == ((2, 3, 64, 32) if rotation % 180 else (2, 3, 32, 64))
    assert video.is_contiguous()
    assert corner_colours(video) == expected
    info = probe_video(path)
    assert (info.height, info.width) == tuple(video.shape[-2:])
    assert info.rotation == rotation % 360


def test_a_slanted_display_matrix_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [corners(32, 64)], rotation=45)
    with pytest.raises(DataError, match=r"a\.mp4: its display matrix turns by .*not a quarter turn"):
        read_video(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_one_upright_frame(tmp_path: Path, orientation: int) -> None:
    """PIL's own EXIF transposition is the reference."""
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
    """Phones put a gain map or a preview there. Small ones are to FFmpeg a motion JPEG."""
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
    path = tmp_path / "frame%03d.png"  # the name must not be taken for a number pattern
    image.save(path)
    video = read_video(path)
    assert video.shape == (1, 3, 17, 33)
    assert (video.int() - 200).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "height"),
    [
        ("ten_bit.mp4", "libx264", "yuv420p10le", 48),
        ("odd.mp4", "libx264", "yuv444p", 47),
        ("grey.mp4", "libx264", "gray", 48),
        ("ten_bit_hevc.mp4", "libx265", "yuv420p10le", 48),
        ("motion_jpeg.avi", "mjpeg", "yuvj420p", 48),
        ("lossless.mkv", "ffv1", "gray16le", 48),
    ],
)
def test_sources_of_any_pixel_format(tmp_path: Path, name: str, codec: str, pix_fmt: str, height: int) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder")
    pictures = [np.full((height, 64, 3), 40 * t + 30, np.uint8) for t in range(4)]
    video = read_video(encode(tmp_path / name, pictures, codec, pix_fmt))
    assert video.shape == (4, 3, height, 64)
    truth = torch.tensor([40 * t + 30 for t in range(4)])
    assert (video.float().mean(dim=(1, 2, 3)) - truth).abs().max() < 4


def test_unequal_frames_are_refused(tmp_path: Path) -> None:
    parts = [
        encode(tmp_path / f"{n}.h264", [corners(*size)] * 3, format="h264").read_bytes()
        for n, size in enumerate([(32, 64), (32, 32)])
    ]
    path = tmp_path / "joined.h264"
    path.write_bytes(b"".join(parts))
    with pytest.raises(DataError, match=r"joined\.h264: frames of unequal size: frame 0 is 64x32, frame 3 is 32x32"):
        read_video(path)
    assert read_video(path, max_frames=3).shape == (3, 3, 32, 64)


def test_a_file_that_breaks_off_gives_its_good_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(20)]
    path = encode(tmp_path / "a.mp4", pictures, faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = read_video(path)
    assert 1 <= len(video) < 20
    assert "a.mp4" in caplog.text


def _text(path: Path) -> None:
    path.write_text("this is no video\n" * 100)


def _playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n")


def _concat_list(path: Path) -> None:
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def _cut_off_start(path: Path) -> None:
    encode(path, [corners(32, 64)] * 8)
    path.write_bytes(path.read_bytes()[:200])


def _index_cut_off(path: Path) -> None:
    encode(path, [corners(32, 64)] * 8)
    path.write_bytes(path.read_bytes()[:-600])


def _data_cut_off(path: Path) -> None:
    encode(path, [corners(32, 64)] * 8, faststart=True)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 8])


def _broken_image(path: Path) -> None:
    Image.fromarray(corners(32, 64)).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:40])


BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "zero_bytes": (lambda path: path.touch(), "empty (0 bytes)"),
    "text": (_text, "cannot be read as a video: Invalid data"),
    "playlist": (_playlist, "cannot be read as a video: Invalid data"),
    "concat_list": (_concat_list, "not a known video or image format"),
    "cut_off_start": (_cut_off_start, "cannot be read as a video"),
    "index_cut_off": (_index_cut_off, "cut off or damaged"),
    "data_cut_off": (_data_cut_off, "first frame cannot be decoded"),
    "audio_only": (audio_only, "only audio"),
    "no_frames": (no_frames, "no frames"),
    "no_frames_mkv": (lambda path: no_frames(path, "matroska"), "no frames"),
    "broken_image": (_broken_image, "first frame cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("reader", [read_video, probe_video])
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, reader) -> None:
    make, reason = BAD_FILES[name]
    path = tmp_path / f"{name}.mp4"
    make(path)
    with pytest.raises(DataError) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("frames", "fragment"),
    [
        (torch.zeros(2, 16, 16, 3), "must be (T, 3, H, W), not (2, 16, 16, 3)"),
        (torch.zeros(0, 3, 16, 16), "must be (T, 3, H, W)"),
        (torch.zeros(3, 16, 16), "must be (T, 3, H, W)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "uint8 or float in [0, 1], not torch.int64"),
        (torch.full((2, 3, 16, 16), torch.nan), "NaN"),
    ],
)
def test_bad_frames_are_not_written(tmp_path: Path, frames: torch.Tensor, fragment: str) -> None:
    with pytest.raises(DataError) as caught:
        write_video(tmp_path / "a.mp4", frames)
    assert "a.mp4" in str(caught.value)
    assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_targets_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    video = smooth_video()
    with pytest.raises(DataError, match=r"written as \.mp4"):
        write_video(tmp_path / "a.avi", video)
    with pytest.raises(ConfigError, match="fps"):
        write_video(tmp_path / "a.mp4", video, fps=0)
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(DataError, match=r"taken\.mp4: cannot be written"):
        write_video(tmp_path / "taken.mp4", video)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", video)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "taken.mp4"]
