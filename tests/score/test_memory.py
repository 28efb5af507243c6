"""Files that ask for more memory than there is: rows that say so, and never the end of a run."""

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from frostline.models.faces.identity import FaceIdentity
from frostline.score import decoding
from frostline.score.files import ResultFile
from frostline.score.result import VideoScore

ScoreFiles = Callable[..., tuple[VideoScore, ...]]


def huge_gif(path: Path, side: int = 11500, frames: int = 1) -> Path:
    """A few bytes that say to be a picture of `side` times `side` pixels."""
    screen = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + b"\xff\0\0\0\xff\0"
    dot = b"\x21\xf9\x04\0\0\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    path.write_bytes(screen + dot * frames + b"\x3b")
    return path


def run_within(gigabytes: float, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that may have so much memory of its own and no more."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({int(gigabytes * 2**30)},) * 2)\n"
    command = [sys.executable, "-c", limit + code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_run_survives_a_file_that_is_too_large(people: Path, tmp_path: Path) -> None:
    """By a real limit, in the order in which it did harm: the others are scored all the same."""
    huge_gif(tmp_path / "huge.gif")
    videos = [people / "half.mp4", tmp_path / "huge.gif", people / "half.mp4"]
    arguments = ["score", *map(str, videos), "--reference", str(people / "face.png"), "--detector", "yunet"]
    arguments += ["--backend", "torch", "--device", "cpu", "--out", "scores.jsonl"]
    code = f"""
import sys, torch
torch.set_num_threads(1)
sys.argv[1:] = {arguments!r}
from frostline.cli import main
main()
"""
    result = run_within(2.5, code, tmp_path)
    rows = ResultFile(tmp_path / "scores.jsonl").read()
    assert [row.status for row in rows] == ["ok", "error", "ok"], result.stderr[-2000:]
    assert rows[1].error.startswith(f"{tmp_path}/huge.gif: ") and "memory" in rows[1].error
    assert rows[0].frame_scores == rows[2].frame_scores
    assert result.returncode == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize("fault", ["half", "face"])
def test_only_the_file_at_fault_is(
    fault: str, people: Path, tmp_path: Path, score_files: ScoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it shares a batch with others, and as a reference."""
    observe = FaceIdentity.observe

    def limited(identity: FaceIdentity, pixels: Tensor) -> Any:
        too_much = (pixels == 90).all(dim=(1, 2, 3)).any() if fault == "half" else pixels.shape[-1] == 240
        if too_much:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
        return observe(identity, pixels)

    monkeypatch.setattr(FaceIdentity, "observe", limited)
    rows = score_files([people / f"{name}.mp4" for name in ("astronaut", "half", "hopper")], people / "face.png")
    if fault == "half":
        assert [row.status for row in rows] == ["ok", "error", "ok"]
        assert rows[1].error == f"{people}/half.mp4: frames of 160x160 need more memory than there is"
    else:
        assert {row.status for row in rows} == {"error"}
        said = f"the reference cannot be used: {people}/face.png: frames of 240x240 need more memory than there is"
        assert {row.error for row in rows} == {said}


def test_any_other_error_is_no_matter_of_memory(
    people: Path, score_files: ScoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(identity: FaceIdentity, pixels: Tensor) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(FaceIdentity, "observe", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        score_files([people / "half.mp4"], people / "face.png")


def test_of_large_frames_one_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However slow the consumer."""
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1000)
    taken: list[int] = []
    stream = decoding.stream_video

    def counting(*arguments: Any) -> Iterator[Any]:
        for number, picture in stream(*arguments):
            taken.append(number)
            yield number, picture

    monkeypatch.setattr(decoding, "stream_video", counting)
    path = huge_gif(tmp_path / "a.gif", side=64, frames=12)
    with decoding.decoded([decoding.Source(0, str(path))], 1, None) as events:
        for seen, event in enumerate(events, 1):
            if isinstance(event, decoding.Chunk):
                assert event.frames.shape == (1, 3, 64, 64)
                # One in the queue, one that waits to get in, and the frame after it.
                assert len(taken) <= seen + 3
    assert len(taken) == 12


def test_a_training_sample_takes_no_more_than_its_own_size(tmp_path: Path) -> None:
    """What is larger is resized as it arrives, channel by channel."""
    (tmp_path / "data").mkdir()
    huge_gif(tmp_path / "data" / "a.gif", frames=3)
    (tmp_path / "data" / "a.txt").write_text("a person")
    code = """
import resource, torch
torch.set_num_threads(1)
from frostline.train.data import VideoPromptDataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample = VideoPromptDataset("data", num_frames=5, height=64, width=64)[0]
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
print(tuple(sample["video"].shape), sample["valid_frames"], grown)
"""
    result = run_within(16, code, tmp_path)
    shape, _, rest = result.stdout.rpartition(")")
    assert shape == "(5, 3, 64, 64", result.stderr[-2000:]
    valid_frames, grown = rest.split()
    # A frame of 0.4 GB, a copy or two while it is converted, and a channel in float32.
    assert valid_frames == "3" and float(grown) < 2.0


def test_a_training_file_that_is_too_large_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.txt").write_text("a person")
    huge_gif(tmp_path / "data" / "a.gif")
    huge_gif(tmp_path / "data" / "b.gif", side=64)
    code = """
import torch
torch.set_num_threads(1)
from frostline.errors import DataError
from frostline.train.data import VideoPromptDataset
dataset = VideoPromptDataset("data", num_frames=5)
print(tuple(dataset[1]["video"].shape))
try:
    dataset[0]
except DataError as error:
    print(error)
"""
    result = run_within(1.2, code, tmp_path)
    assert result.stdout.startswith("(5, 3, 64, 64)\n"), result.stderr
    assert "a.gif" in result.stdout and "memory" in result.stdout, result.stdout


def test_a_video_is_not_read_at_once_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.errors import DataError
    from frostline.video import read_video, reading

    path = huge_gif(tmp_path / "a.gif", side=64, frames=12)
    assert read_video(path).shape == (12, 3, 64, 64)
    monkeypatch.setattr(reading, "_MAX_VIDEO_PIXELS", 10 * 64 * 64)
    with pytest.raises(DataError, match=r"a\.gif: too long to be read at once: give max_frames"):
        read_video(path)
    assert read_video(path, max_frames=10).shape == (10, 3, 64, 64)
