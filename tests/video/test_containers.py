"""Video containers: the stream that a player shows, as it is displayed; lost frames are reported."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.frame import VideoFrame
from video_files import damage_packet, encode, hide_all_but, packets

from frostline.video import count_frames, probe_video, read_video, stream_video

# One frame for each level, so that frames can be distinguished by their brightness.
LEVELS = tuple(range(20, 236, 9))
PICTURES = [np.full((64, 64, 3), level, np.uint8) for level in LEVELS]
TEXTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
TEXTURED = [np.roll(TEXTURE, t, axis=1) for t in range(24)]


def streamed(path: Path, max_frames: int | None = None) -> tuple[list[float], list[str]]:
    """Return the mean of each frame, and the notes."""
    notes: list[str] = []
    return [picture.mean() for _, picture in stream_video(path, max_frames, warn=notes.append)], notes


def several_streams(path: Path, *streams: tuple[str, int, list[int], Disposition]) -> None:
    """Write a file with several streams: codec, size, the level of each frame, disposition."""
    with av.open(str(path), "w") as container:
        opened = []
        for codec, side, levels, disposition in streams:
            stream = container.add_stream(codec, rate=16)
            stream.height = stream.width = side
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            opened.append((stream, side, levels))
        for stream, side, levels in opened:
            for level in levels:
                frame = VideoFrame.from_ndarray(np.full((side, side, 3), level, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())


@pytest.mark.parametrize(
    ("suffix", "codec", "levels"), [("mkv", "libx264", [200] * 8), ("mkv", "mjpeg", [200]), ("mp4", "mjpeg", [200])]
)
def test_the_stream_that_players_show_is_read(tmp_path: Path, suffix: str, codec: str, levels: list[int]) -> None:
    """Skip a small preview or a cover picture that comes before the video."""
    path = tmp_path / f"a.{suffix}"
    shown = [60] * 8
    several_streams(path, (codec, 64, levels, Disposition(0)), ("libx264", 96, shown, Disposition.default))
    means, notes = streamed(path)
    assert means == pytest.approx(shown, abs=2)
    assert notes == ["it has 2 video streams: using number 1, which players show"]
    assert probe_video(path).width == 96
    assert count_frames(path, 100) == 8


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_edit_lists_are_heeded_and_are_no_loss(tmp_path: Path, suffix: str) -> None:
    """Skip the frames that a cut without re-encoding hides at start and end."""
    path = encode(tmp_path / f"a.{suffix}", PICTURES, gop=12, b_frames=2)
    hide_all_but(path, 9, 7)
    means, notes = streamed(path)
    assert means == pytest.approx(LEVELS[9:16], abs=3)
    assert notes == []
    assert probe_video(path).frames == count_frames(path, 100) == 7


DAMAGED = {"h264.mp4": "libx264", "h264.mkv": "libx264", "h265.mkv": "libx265", "vp8.webm": "libvpx"}
DAMAGED |= {"vp9.webm": "libvpx-vp9", "xvid.avi": "mpeg4"}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_packet_takes_no_others_with_it(tmp_path: Path, name: str) -> None:
    if DAMAGED[name] not in av.codecs_available:
        pytest.skip(f"this PyAV has no {DAMAGED[name]} encoder")
    path = encode(tmp_path / name, TEXTURED, DAMAGED[name], gop=6, b_frames=0)
    assert (len(streamed(path)[0]), streamed(path)[1]) == (24, [])
    # VP8 decodes zeros as a frame that is never shown.
    damage_packet(path, 5, fill=255 if "vp8" in name else 0)
    means, notes = streamed(path)
    assert len(means) == 23
    (note,) = notes
    assert note.startswith("1 of its 24 frames cannot be decoded") and note.endswith(": using the others")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_hangs_on_a_lost_key_frame_is_counted(tmp_path: Path, suffix: str) -> None:
    """Count the frames that need it; the decoder does not report them."""
    path = encode(tmp_path / f"a.{suffix}", TEXTURED, gop=6, b_frames=0)
    damage_packet(path, 0)
    means, notes = streamed(path)
    assert len(means) == 18
    assert [note.partition(" cannot")[0] for note in notes] == ["6 of its 24 frames"]


def test_a_loss_before_the_last_frame_asked_for_is_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", TEXTURED, gop=6, b_frames=0)
    damage_packet(path, 5)
    assert len(streamed(path, 10)[0]) == 10
    assert [note.partition(" cannot")[0] for note in streamed(path, 10)[1]] == ["1 of its frames"]
    assert streamed(path, 3)[1] == []


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.flv", "libx264"), ("a.avi", "mjpeg")])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, name: str, codec: str) -> None:
    """These containers state their duration, but no number of frames."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(tmp_path / name, TEXTURED, codec, pix_fmt, gop=6, b_frames=0)
    assert (len(streamed(path)[0]), streamed(path)[1]) == (24, [])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    means, notes = streamed(path)
    assert 1 <= len(means) < 24
    assert any(note.startswith("it ends after 0.") and " of 1.50 seconds" in note for note in notes), notes


def test_an_mp4_file_that_is_cut_off_says_how_many_frames_it_lost(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", TEXTURED, gop=6, b_frames=0, faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    means, notes = streamed(path)
    assert 1 <= len(means) < 24
    assert [note.partition(" cannot")[0] for note in notes] == [f"{24 - len(means)} of its 24 frames"]


def test_sound_that_goes_on_is_no_loss(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", PICTURES, audio_seconds=4)
    assert (len(streamed(path)[0]), streamed(path)[1]) == (24, [])


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.mp4", "libx264")])
def test_pauses_between_frames_are_no_loss(tmp_path: Path, name: str, codec: str) -> None:
    """AVI fills pauses with empty chunks, and counts them as frames."""
    times = [0, 1, 2, 3, 6, 7, 8, 12, 13, 24]
    path = encode(tmp_path / name, PICTURES[:10], codec, times=times)
    assert (len(streamed(path)[0]), streamed(path)[1]) == (10, [])
    assert count_frames(path, 100) == 10


def test_a_picture_that_is_never_shown_is_no_loss(tmp_path: Path) -> None:
    """VP8 has such frames; here, the header of one frame is changed to be one."""
    path = encode(tmp_path / "a.webm", TEXTURED, "libvpx", gop=6)
    position, _ = packets(path)[5]
    content = bytearray(path.read_bytes())
    content[position + 4] &= ~0x10  # the payload follows a header of Matroska
    path.write_bytes(content)
    assert (len(streamed(path)[0]), streamed(path)[1]) == (23, [])
    assert count_frames(path, 100) == 23


@pytest.mark.parametrize(("ratio", "size"), [("2/1", (64, 128)), ("1/2", (128, 64)), ("4320/4319", (64, 64))])
def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, ratio: str, size: tuple[int, int]) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    path = encode(tmp_path / "a.mp4", [picture] * 3, codec_options={"x264-params": f"sar={ratio}"})
    assert read_video(path).shape == (3, 3, *size)
    info = probe_video(path)
    assert (info.height, info.width) == size
    # The middle of the picture stays in the middle.
    assert (read_video(path)[0, 0] > 127).float().mean() == pytest.approx(0.5, abs=0.02)


def test_turned_and_stretched(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", PICTURES[:2], rotation=90, codec_options={"x264-params": "sar=2/1"})
    assert read_video(path).shape == (2, 3, 128, 64)
    assert (probe_video(path).height, probe_video(path).width) == (128, 64)
