"""Files that need more memory than there is give rows with an error, and do not end a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from large_files import huge_gif, run_within
from torch import Tensor

from frostline.models.faces.identity import FaceIdentity
from frostline.score import decoding
from frostline.score.files import ResultFile
from frostline.score.result import VideoScore

ScoreFiles = Callable[..., tuple[VideoScore, ...]]


def test_a_run_survives_a_file_that_is_too_large(people: Path, tmp_path: Path) -> None:
    """Use a real memory limit, with a large file between two small ones, which are scored."""
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
    """Test a file that shares a batch with others, and a reference."""
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
        assert rows[1].error == f"{people}/half.mp4: out of memory with frames of 160x160"
    else:
        assert {row.status for row in rows} == {"error"}
        said = f"the reference cannot be used: {people}/face.png: out of memory with frames of 240x240"
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
    """Decode only one large frame ahead, even if the consumer is slow."""
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
                # One frame in the queue, one that waits to get into it, and the frame after it.
                assert len(taken) <= seen + 3
    assert len(taken) == 12
