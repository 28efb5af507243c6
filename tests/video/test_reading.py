"""Written videos are read back with any pixels and orientation, and every broken file gives a specific error."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from corner_pictures import BLUE, GREEN, RED, WHITE, corner_colours, corners
from large_files import huge_gif
from PIL import Image
from video_files import audio_only, encode, no_frames

from frostline.errors import ConfigError, DataError
from frostline.video import VideoInfo, probe_video, read_video, reading, write_video


def smooth_video(frames: int = 5, height: int = 48, width: int = 64) -> torch.Tensor:
    """Return uint8 `(T, 3, H, W)`: a slow colour gradient that changes a little between frames."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pictures = [torch.stack([x, y, torch.full_like(x, t / frames)]) for t in range(frames)]
    return (torch.stack(pictures) * 255).round().to(torch.uint8)


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
    with pytest.raises(
        DataError, match=r"a\.mp4: its display matrix rotates by .*only quarter turns and mirroring are supported"
    ):
        read_video(path)


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
    with pytest.raises(DataError, match=r"joined\.h264: frames differ in size: frame 0 is 64x32, frame 3 is 32x32"):
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
    "index_cut_off": (_index_cut_off, "truncated or damaged"),
    "data_cut_off": (_data_cut_off, "no frame can be decoded"),
    "audio_only": (audio_only, "only audio"),
    "no_frames": (no_frames, "no frames"),
    "no_frames_mkv": (lambda path: no_frames(path, "matroska"), "no frames"),
    "broken_image": (_broken_image, "cannot be read as a PNG picture"),
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


def test_a_video_is_not_read_at_once_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = huge_gif(tmp_path / "a.gif", side=64, frames=12)
    assert read_video(path).shape == (12, 3, 64, 64)
    monkeypatch.setattr(reading, "_MAX_VIDEO_PIXELS", 10 * 64 * 64)
    with pytest.raises(DataError, match=r"a\.gif: too long to be read at once: set max_frames"):
        read_video(path)
    assert read_video(path, max_frames=10).shape == (10, 3, 64, 64)
