"""Files with faults: each is scored correctly or reported with the reason, and other files are not affected."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import video_files
from PIL import Image
from score_videos import moving, portrait

from frostline.score import decoding
from frostline.score.result import VideoScore
from frostline.video import read_video, stream_video, write_video

ScoreFiles = Callable[..., tuple[VideoScore, ...]]


def encode(
    path: Path, pictures: list[np.ndarray], codec: str = "libx264", pix_fmt: str = "yuv444p", **extra: Any
) -> Path:
    """Encode at a quality that does not change the score of a face; see `video_files.encode`."""
    return video_files.encode(path, pictures, codec, pix_fmt, crf=10, **extra)


def pictures(person: str = "astronaut", frames: int = 4, size: int = 160) -> list[np.ndarray]:
    return list(moving(person, frames, size).permute(0, 2, 3, 1).numpy())


def _text(path: Path) -> None:
    path.write_text("this is no video\n" * 100)


def _half(path: Path) -> None:
    # Without B-frames, because with them the number of damaged frames before the cut depends on the encoder.
    encode(path, pictures(frames=12), faststart=True, b_frames=0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])


def _index_cut_off(path: Path) -> None:
    encode(path, pictures())
    path.write_bytes(path.read_bytes()[:-600])


def _sizes(path: Path) -> None:
    parts = [encode(path.with_suffix(f".{size}.h264"), pictures(size=size), format="h264") for size in (160, 128, 192)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))


def _turned(path: Path) -> None:
    encode(path, [np.rot90(picture) for picture in pictures()], rotation=-90)


def _alpha_video(path: Path) -> None:
    opaque = [np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]) for picture in pictures()]
    encode(path, opaque, "ffv1", "bgra", format="matroska")


def _alpha_picture(path: Path) -> None:
    Image.fromarray(portrait("astronaut")).convert("RGBA").save(path, format="PNG")


def _large(path: Path) -> None:
    picture = np.full((2160, 3840, 3), 120, np.uint8)
    picture[800:1400, 1600:2200] = portrait("astronaut", 600)
    encode(path, [picture] * 2, pix_fmt="yuv420p")


SCORED: dict[str, tuple[Callable[[Path], object], int]] = {
    "plain": (lambda path: encode(path, pictures()), 4),
    "ten_bit": (lambda path: encode(path, pictures(), pix_fmt="yuv420p10le"), 4),
    "grey": (lambda path: encode(path, pictures(), pix_fmt="gray"), 4),
    "odd_sized": (lambda path: encode(path, [picture[:157, :159] for picture in pictures()]), 4),
    "variable_size": (_sizes, 12),
    "rotated": (_turned, 4),
    "alpha_video": (_alpha_video, 4),
    "alpha_picture": (_alpha_picture, 1),
    "single_image": (lambda path: Image.fromarray(portrait("astronaut")).save(path, format="JPEG", quality=95), 1),
    "one_frame": (lambda path: encode(path, pictures(frames=1)), 1),
    "four_k": (_large, 2),
}
"""Unusual but valid files: how to create them, and the number of their frames."""

REPORTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "zero_bytes": (lambda path: path.touch(), "empty (0 bytes)"),
    "unreadable": (_text, "cannot be read as a video"),
    "index_cut_off": (_index_cut_off, "truncated or damaged"),
    "zero_frames": (video_files.no_frames, "no frames"),
    "audio_only": (video_files.audio_only, "only audio"),
}
"""Files that cannot be scored, and a part of the error message of each."""


def test_every_fault_is_scored_or_reported(tmp_path: Path, people: Path, score_files: ScoreFiles) -> None:
    """Score all files in one run, alternating with valid ones, so that a fault would affect its neighbours."""
    names = [
        name for pair in zip([*SCORED, "plain", "plain"], [*REPORTED, *["plain"] * 6], strict=False) for name in pair
    ]
    for name in dict.fromkeys([*names, *SCORED]):
        (SCORED.get(name) or REPORTED[name])[0](tmp_path / f"{name}.mp4")
    names += [name for name in SCORED if name not in names]
    rows = score_files([tmp_path / f"{name}.mp4" for name in names], people / "face.png", batch=8)
    assert [Path(row.video).stem for row in rows] == names
    for name, row in zip(names, rows, strict=True):
        if name in REPORTED:
            assert (row.status, row.face_score, row.frames) == ("error", None, None)
            assert REPORTED[name][1] in row.error and f"{name}.mp4" in row.error
        else:
            assert (row.status, row.error, row.frames) == ("ok", "", SCORED[name][1]), name
            assert row.detection_rate == 1 and row.face_score is not None and row.face_score > 0.8, (name, row)


def test_a_truncated_video_is_scored_as_far_as_it_goes(tmp_path: Path, people: Path, score_files: ScoreFiles) -> None:
    _half(tmp_path / "half.mp4")
    whole = encode(tmp_path / "whole.mp4", pictures(frames=12), faststart=True, b_frames=0)
    cut, full = score_files([tmp_path / "half.mp4", whole], people / "face.png")
    assert cut.status == "ok" and cut.frames is not None and 1 <= cut.frames < 12
    assert "frames" in cut.note
    # The decoder conceals missing data in the last one or two frames.
    sure = max(1, cut.frames - 2)
    assert (cut.frame_scores or ())[:sure] == pytest.approx((full.frame_scores or ())[:sure], abs=1e-4)


@pytest.mark.parametrize("fault", ["missing", "audio_only", "no_face"])
def test_an_unusable_reference_fails_its_videos_only(
    fault: str, tmp_path: Path, people: Path, score_files: ScoreFiles
) -> None:
    from frostline.progress import Progress
    from frostline.score.request import Pair
    from frostline.score.run import RunOptions, run_score
    from frostline.score.settings import ScoreSettings

    bad = people / "nobody.mp4" if fault == "no_face" else tmp_path / f"{fault}.mp4"
    if fault != "no_face":
        REPORTED[fault][0](bad)
    references = [people / "face.png", bad, people / "face.png", bad]
    pairs = [Pair(index, str(people / "astronaut.mp4"), str(path)) for index, path in enumerate(references)]
    options = RunOptions(backend="torch", device="cpu")
    outcome = run_score(pairs, ScoreSettings(detector="yunet"), options, Progress())
    assert outcome is not None
    assert [row.status for row in outcome.rows] == ["ok", "error"] * 2
    said = "no face was found" if fault == "no_face" else REPORTED[fault][1]
    assert all(said in row.error and "reference" in row.error for row in outcome.rows[1::2])
    assert outcome.summary.failed == 2


def test_what_is_streamed_is_what_is_read(tmp_path: Path) -> None:
    for name in ("rotated", "ten_bit", "grey", "odd_sized", "single_image"):
        path = tmp_path / f"{name}.mp4"
        SCORED[name][0](path)
        streamed = np.stack([picture for _, picture in stream_video(path)])
        assert torch.equal(torch.from_numpy(streamed).permute(0, 3, 1, 2), read_video(path)), name


def test_memory_does_not_grow_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode only `_CHUNKS_AHEAD` chunks ahead, even if the consumer is slow."""
    path = write_video(tmp_path / "long.mp4", torch.zeros(300, 3, 64, 64, dtype=torch.uint8))
    taken: list[int] = []

    def counting(*arguments: Any) -> Iterator[tuple[int, np.ndarray]]:
        for number, picture in stream_video(*arguments):
            taken.append(number)
            yield number, picture

    monkeypatch.setattr(decoding, "stream_video", counting)
    monkeypatch.setattr(decoding, "_CHUNK_FRAMES", 8)
    with decoding.decoded([decoding.Source(0, str(path))], 1, None) as events:
        seen = 0
        for event in events:
            if isinstance(event, decoding.Chunk):
                seen += len(event.numbers)
                # Chunks in the queue, one that waits to get into it, and the first frame of the next chunk.
                assert len(taken) <= seen + 8 * (decoding._CHUNKS_AHEAD + 2) + 1
    assert seen == len(taken) == 300


def _corrupt(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the file with some bytes flipped, its end cut off, or the size of a box overwritten."""
    content = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(content[: rng.integers(1, len(content))])
    if kind == 1:
        place = int(rng.integers(0, len(content) - 4))
        content[place : place + 4] = struct.pack(">I", int(rng.choice([0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFF])))
        return bytes(content)
    for place in rng.integers(0, len(content), int(rng.choice([1, 4, 32]))):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content[: rng.integers(len(content) // 2, len(content))]) if kind == 2 else bytes(content)


@pytest.mark.timeout(200)
def test_two_hundred_fuzzed_files(tmp_path: Path, people: Path, score_files: ScoreFiles) -> None:
    rng = np.random.default_rng(11)
    seeds = [
        encode(tmp_path / "a.mp4", pictures(frames=3, size=96), pix_fmt="yuv420p").read_bytes(),
        encode(tmp_path / "b.mp4", pictures(frames=3, size=96), pix_fmt="yuv420p", faststart=True).read_bytes(),
        encode(tmp_path / "c.mp4", pictures(frames=3, size=96), "mpeg4", "yuv420p").read_bytes(),
    ]
    videos = []
    for index in range(200):
        path = tmp_path / f"fuzzed_{index:03d}.mp4"
        path.write_bytes(_corrupt(seeds[index % 3], rng))
        videos.append(path)
    videos.insert(100, tmp_path / "a.mp4")
    rows = score_files([*videos, tmp_path / "a.mp4"], people / "face.png")
    assert [row.video for row in rows] == [*map(str, videos), str(tmp_path / "a.mp4")]
    assert rows[100].status == rows[-1].status == "ok"
    assert rows[100].frame_scores == pytest.approx(rows[-1].frame_scores, abs=1e-5)
    for row in rows:
        assert (row.frames or 0) > 0 if row.status == "ok" else row.error.startswith(row.video)
    failed = sum(row.status == "error" for row in rows)
    assert 20 < failed < 180
