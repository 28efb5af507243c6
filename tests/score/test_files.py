"""Results files: what is written is read back, an incomplete last row is dropped, and runs can be resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Python, run_python
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import ConfigError, DataError
from frostline.score.files import ResultFile
from frostline.score.result import COLUMNS, VideoScore

ScoreFiles = Callable[..., tuple[VideoScore, ...]]

# Line ends become spaces in CSV. The last two characters are Python's spelling of bytes of a name that is not UTF-8.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")
    | st.sampled_from("\u2028\u2029\x85\x0b\x1c'=+-@\t\udce9\udcff"),
    max_size=12,
)
SCORES = st.floats(-1, 1)


@st.composite
def rows(draw: st.DrawFn) -> VideoScore:
    common = {"index": draw(st.integers(0, 9)), "settings": draw(TEXTS), "prompt": draw(TEXTS), "note": draw(TEXTS)}
    if draw(st.booleans()):
        return VideoScore(video=draw(TEXTS), reference="r", status="error", error=draw(TEXTS), **common)
    scores = draw(st.lists(st.none() | SCORES, min_size=1, max_size=4))
    return VideoScore(
        video=draw(TEXTS),
        reference=draw(TEXTS),
        status="ok",
        face_score=draw(st.none() | SCORES),
        detection_rate=draw(SCORES),
        frames=len(scores),
        worst_frame_box=(1.5, 2.0, 3.0, 4.25),
        worst_frame_landmarks=((1.0, 2.0),) * 5,
        frame_numbers=tuple(range(len(scores))),
        frame_scores=tuple(scores),
        **common,
    )


@given(written=st.lists(rows(), max_size=4), suffix=st.sampled_from([".jsonl", ".csv"]), torn=st.integers(0, 200))
def test_reads_back_what_was_written_whatever_is_torn_off(
    written: list[VideoScore], suffix: str, torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = ResultFile(tmp_path_factory.mktemp("files") / f"scores{suffix}")
    file.rewrite(written[:1])
    for row in written[1:]:
        file.append(row)
    assert file.read() == written
    content = file.path.read_bytes()
    lines = content.splitlines(keepends=True)
    torn = min(torn, len(lines[-1]) if written else 0)
    file.path.write_bytes(content[: len(content) - torn])
    assert file.read() == (written[:-1] if torn else written)


def test_both_formats_are_what_others_read(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    videos = [people / "astronaut.mp4", people / "absent.mp4", people / "half.mp4"]
    expected = score_files(videos, people / "face.png", out=tmp_path / "a.jsonl")
    score_files(videos, people / "face.png", out=tmp_path / "a.csv")
    objects = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [list(values) for values in (*objects, *records)] == [list(COLUMNS)] * 6
    for row, values, record in zip(expected, objects, records, strict=True):
        assert values["face_score"] == row.face_score
        assert record["face_score"] == ("" if row.face_score is None else str(row.face_score))
        assert json.loads(record["frame_scores"] or "null") == values["frame_scores"]
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert (summary["videos"], summary["failed"], sum(summary["histogram"])) == (3, 1, 2)
    assert summary["mean"] == pytest.approx(sum(row.face_score or 0 for row in expected) / 2)


def test_every_column_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in page and not name.startswith("best_frame_")] == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_goes_on_where_it_was_stopped(suffix: str, people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    """Cut the file at several bytes: finished rows are not computed again, and the results are the same at the end."""
    videos = [people / f"{name}.mp4" for name in ("astronaut", "absent", "hopper", "half")]
    out = tmp_path / f"scores{suffix}"
    score_files(videos, people / "face.png", out=out)
    whole = out.read_bytes()
    firsts = ResultFile(out).read()
    lines = whole.splitlines(keepends=True)
    for kept in (0, len(lines[0]), len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:kept])
        finished = ResultFile(out).read()
        rows = score_files(videos, people / "face.png", out=out, resume=True)
        assert rows[: len(finished)] == tuple(finished), kept
        again = ResultFile(out).read()
        assert again == list(rows)
        for row, first in zip(again, firsts, strict=True):
            assert (row.index, row.video, row.status, row.error) == (
                first.index,
                first.video,
                first.status,
                first.error,
            )
            assert row.frame_scores == pytest.approx(first.frame_scores, abs=1e-5)


def test_results_of_something_else_are_not_gone_on_from(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    score_files([people / "half.mp4"], people / "face.png", out=out)
    with pytest.raises(ConfigError, match=r"other settings .*every=1.*every=2.*--overwrite"):
        score_files([people / "half.mp4"], people / "face.png", out=out, resume=True, every=2)
    with pytest.raises(ConfigError, match="other videos"):
        score_files([people / "hopper.mp4"], people / "face.png", out=out, resume=True)
    with pytest.raises(ConfigError, match=r"scores\.jsonl already exists.*--resume.*--overwrite"):
        score_files([people / "half.mp4"], people / "face.png", out=out, overwrite=False)
    out.write_text('{"index": 0}\n')
    with pytest.raises(DataError, match=r"scores\.jsonl, line 1: is not a valid row of results"):
        score_files([people / "half.mp4"], people / "face.png", out=out, resume=True)
    with pytest.raises(ConfigError, match=r"\.jsonl or \.csv"):
        score_files([people / "half.mp4"], people / "face.png", out=tmp_path / "scores.txt")


def test_a_run_that_is_killed_leaves_a_valid_file(people: Path, tmp_path: Path) -> None:
    """Kill a real process with SIGKILL while it works, and resume in another one."""
    out = tmp_path / "scores.jsonl"
    videos = [str(people / f"{name}.mp4") for name in ("astronaut", "half", "hopper", "nobody")] * 10
    command = ["-m", "frostline", "score", *videos, "--reference", str(people / "face.png")]
    command += ["--detector", "yunet", "--backend", "torch", "--batch", "4", "--out", str(out)]
    process = Python(*command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while (not out.exists() or out.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    finished = before[: before.rfind(b"\n") + 1]
    assert 5 <= finished.count(b"\n") < len(videos)
    assert [json.loads(line)["index"] for line in finished.splitlines()] == list(range(finished.count(b"\n")))
    result = run_python(*command, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    after = out.read_bytes()
    assert after.startswith(finished)
    assert [json.loads(line)["video"] for line in after.splitlines()] == videos


def test_two_processes_share_the_work(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    """Start `accelerate launch -m frostline score …`: the rows equal those of one process, in the input's order."""
    out = tmp_path / "scores.jsonl"
    names = ("astronaut", "hopper", "absent", "half", "nobody")
    videos = [people / f"{name}.mp4" for name in names]
    alone = score_files(videos, people / "face.png")
    # The part of an interrupted run with three processes, whose row is reused.
    left = alone[3].model_copy(update={"note": "from the part"})
    part = ResultFile(tmp_path / ".scores.jsonl.0-of-3.part.jsonl")
    part.rewrite([left])
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "frostline", "score", *map(str, videos), "--reference", str(people / "face.png"), "--resume"]
    command += ["--detector", "yunet", "--backend", "torch", "--device", "cpu", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=200)
    rows = ResultFile(out).read()
    assert [row.video for row in rows] == [str(video) for video in videos], result.stderr
    assert [row.status for row in rows] == [row.status for row in alone]
    assert rows[3] == left
    for row, expected in zip(rows, alone, strict=True):
        assert row.face_score == pytest.approx(expected.face_score, abs=1e-5)
    assert result.returncode == 1, "one video is missing"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"scores.jsonl", "scores.summary.json"}
    assert result.stdout.count("videos scored") == 1
