"""The pairs to score, and the command: exit codes, error messages, a summary."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from score_videos import portrait
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError, DataError
from frostline.score.files import ResultFile
from frostline.score.request import gather_pairs, pairs_of_file
from frostline.score.result import VideoScore
from frostline.score.summary import summarize

ScoreFiles = Callable[..., tuple[VideoScore, ...]]
YUNET = ["--detector", "yunet", "--backend", "torch", "--device", "cpu"]


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["score", *map(str, arguments), *YUNET], env={"COLUMNS": "250", **(env or {})})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_pairs_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(
        "\ufeffvideo,reference,prompt\na.mp4,ref.png,hello\nb.mp4,,\n,ref.png,x\n../c.mp4,ref.png,\n"
        'd.mp4,/etc/passwd,\ne.mp4,ref.png,"one, two"\nf.mp4,ref.png,one,two\n'
    )
    pairs = pairs_of_file(file, "default.png")
    assert [pair.index for pair in pairs] == list(range(7))
    assert (pairs[0].video, pairs[0].reference, pairs[0].prompt) == (
        str(tmp_path / "a.mp4"),
        str(tmp_path / "ref.png"),
        "hello",
    )
    assert pairs[1].reference == "default.png"
    faults = ["", "", "column 'video' is empty", "../c.mp4 is outside", "/etc/passwd is outside", "", "more fields"]
    assert all(said in pair.fault and bool(said) == bool(pair.fault) for said, pair in zip(faults, pairs, strict=True))
    assert not any("outside" in pair.fault for pair in pairs_of_file(file, allow_outside=True))


def test_a_datasets_metadata_scores_against_itself(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mp4,a person\n")
    (pair,) = gather_pairs([], None, tmp_path / "metadata.csv")
    assert pair.video == pair.reference == str(tmp_path / "a.mp4")
    (pair,) = gather_pairs([], "face.png", tmp_path / "metadata.csv")
    assert (pair.reference, pair.prompt) == ("face.png", "a person")


@pytest.mark.parametrize(
    "text",
    ["", "video,reference\n", "path,reference\na,b\n", 'video\n"a\n', "video,ref\na,b\n", "video,Reference\na,b\n"],
)
def test_files_that_are_no_pairs_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"pairs\.csv"):
        pairs_of_file(tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to score"),
        (("a.mp4",), "--reference is missing"),
        (("a.mp4", "--pairs", "p.csv"), "videos and --pairs exclude each other"),
        (("--pairs", "absent.csv"), "no such file of pairs"),
        (("a.mp4", "--reference", "f.png", "--detector", "retina"), "unknown face detector 'retina'"),
        (("a.mp4", "--reference", "f.png", "--embedder", "resnet"), "unknown face embedder 'resnet'"),
        (("a.mp4", "--reference", "f.png", "--backend", "onnx"), "unknown backend 'onnx'"),
        (("a.mp4", "--reference", "f.png", "--every", "0"), "every"),
        (("a.mp4", "--reference", "f.png", "--missing-face", "skip"), "missing_face"),
        (("a.mp4", "--reference", "f.png", "--face", "first"), "face: Input should be 'largest' or 'best'"),
        (("a.mp4", "--reference", "f.png", "--out", "scores.txt"), ".jsonl or .csv"),
        (("a.mp4", "--reference", "f.png", "--resume"), "--resume needs --out: the results file to continue from"),
        (("a.mp4", "--reference", "f.png", "--out", "s.csv", "--resume", "--overwrite"), "use only one of them"),
        (("a.mp4", "--reference", "f.png", "--batch", "0"), "--batch"),
        (("a.mp4", "b.mp4", "--reference", "absent.png"), "the reference absent.png: no such file"),
    ],
)
def test_usage_errors_exit_with_2(
    arguments: tuple[str, ...], said: str, people: Path, tmp_path: Path, refused_usage: Callable[..., str]
) -> None:
    face = str(people / "face.png")
    assert said in refused_usage("score", *(face if argument == "f.png" else argument for argument in arguments))
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_and_the_summary(people: Path, tmp_path: Path) -> None:
    reference = ("--reference", people / "face.png")
    code, said = run(people / "astronaut.mp4", people / "half.mp4", *reference, "--fail-under", "0.8")
    assert code == 0
    assert "face score: mean" in said and "2 of 2 videos scored, 11 frames" in said and "frames/s" in said
    assert run(people / "astronaut.mp4", people / "hopper.mp4", *reference, "--fail-under", "0.8")[0] == 1
    assert run(people / "nobody.mp4", *reference, "--fail-under", "0.1")[0] == 1
    code, said = run(people / "astronaut.mp4", tmp_path / "[absent].mp4", *reference)
    assert code == 1
    assert f"failed {tmp_path}/[absent].mp4: no such file" in said


def test_writes_results_and_report(people: Path, tmp_path: Path) -> None:
    (people / "pairs.csv").write_text(
        "video,reference,prompt\nastronaut.mp4,face.png,a woman\nhopper.mp4,hopper.mp4,\n"
    )
    out, report = tmp_path / "deep" / "scores.jsonl", tmp_path / "report.html"
    code, _ = run("--pairs", people / "pairs.csv", "--out", out, "--report", report, "--missing-face", "zero")
    assert code == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["prompt"], Path(second["reference"]).name) == ("a woman", "hopper.mp4")
    assert min(first["face_score"], second["face_score"]) > 0.8
    assert "Is it the same person?" in report.read_text()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_no_name_ends_a_run(suffix: str, people: Path, tmp_path: Path) -> None:
    """Test a name that is not UTF-8, one with terminal codes, and one that a spreadsheet would compute; also resume."""
    names = [b"a.mp4", b"caf\xe9.mp4", b"b\x1b[2J\nc.mp4", b"=1+1.mp4", b"gone\xff.mp4", b"z.mp4"]
    videos = [tmp_path / os.fsdecode(name) for name in names]
    for video in videos:
        if "gone" not in video.name:
            video.write_bytes((people / "half.mp4").read_bytes())
    out, report = tmp_path / f"scores{suffix}", tmp_path / "report.html"
    with contextlib.chdir(tmp_path):
        arguments = [*(os.fsdecode(name) for name in names), "--reference", people / "face.png", "--out", out]
        code, said = run(*arguments, "--report", report)
        assert code == 1 and r"failed gone\xff.mp4: no such file" in said and "\x1b" not in said
        finished = out.read_bytes()
        assert run(*arguments, "--resume")[0] == 1
    assert out.read_bytes() == finished
    rows = ResultFile(out).read()
    assert [row.status for row in rows] == ["ok"] * 4 + ["error", "ok"]
    assert [os.fsencode(row.video) for row in rows[:2]] == names[:2]
    page = report.read_text(encoding="utf-8")
    assert r"caf\xe9.mp4" in page and "\x1b" not in page
    if suffix == ".csv":
        assert b"\n3,'=1+1.mp4," in finished and b"caf\xe9.mp4" in finished
    else:
        assert [json.loads(line)["video"] for line in finished.decode().splitlines()] == [*map(os.fsdecode, names)]


def test_a_note_on_the_reference_is_printed_once(people: Path, tmp_path: Path) -> None:
    both = np.concatenate([portrait("hopper", 240), portrait("astronaut", 240)], axis=1)
    Image.fromarray(both).save(tmp_path / "both.png")
    _, said = run(people / "half.mp4", people / "hopper.mp4", "--reference", tmp_path / "both.png", "--face", "best")
    assert said.count("note ") == said.count(f"note {tmp_path / 'both.png'}: 2 faces were found") == 1


def test_pairs_name_files_by_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"video,prompt\ncaf\xe9.mp4,'=a smile\n")
    (pair,) = pairs_of_file(tmp_path / "pairs.csv")
    assert (os.fsencode(pair.video), pair.prompt) == (os.fsencode(tmp_path) + b"/caf\xe9.mp4", "=a smile")


def test_where_nothing_can_be_written_nothing_is_scored(people: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    for option in ("--out", "--report"):
        with pytest.raises(DataError, match=r"taken/scores\.csv: cannot be written: .*taken is not a folder"):
            run(people / "half.mp4", "--reference", people / "face.png", option, taken / "scores.csv")
    assert list(tmp_path.iterdir()) == [taken]


def test_engines_are_built_on_demand_and_then_found(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    files = [people / "astronaut.mp4", people / "half.mp4"]
    in_torch = score_files(files, people / "face.png", backend="auto", engines=tmp_path)
    assert {row.face_detector_backend for row in in_torch} == {"torch"}, "engines must only be built on request"
    built = score_files(files, people / "face.png", backend="onnxruntime", engines=tmp_path)
    assert {(row.face_detector_backend, row.face_embedder_backend) for row in built} == {("onnxruntime",) * 2}
    for row, expected in zip(built, in_torch, strict=True):
        assert row.frame_scores == pytest.approx(expected.frame_scores, abs=1e-4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx")}
    assert len(stamps) == 2
    score_files(files, people / "face.png", backend="onnxruntime", engines=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx")} == stamps


def test_summary() -> None:
    common = {"video": "v", "reference": "r", "settings": "s", "status": "ok"}
    scores = (0.5, 1.0, -0.05, 0.31)
    rows = [VideoScore(index=i, face_score=s, detection_rate=1.0, frames=2, **common) for i, s in enumerate(scores)]
    rows.append(VideoScore(index=4, detection_rate=0.0, frames=2, **common))
    rows.append(VideoScore(index=5, video="v", reference="r", settings="s", status="error", error="no"))
    summary = summarize(rows, seconds=2.0, new_frames=10)
    assert (summary.videos, summary.failed, summary.without_face, summary.frames) == (6, 1, 1, 10)
    assert summary.mean == pytest.approx(0.44) and summary.median == pytest.approx(0.405)
    assert (summary.lowest, summary.highest, summary.detection_rate) == (-0.05, 1.0, 0.8)
    assert {i: n for i, n in enumerate(summary.histogram) if n} == {9: 1, 13: 1, 15: 1, 19: 1}
    assert summary.frames_per_second == 5
    assert summary.reaches(0.35) and not summary.reaches(0.36)
    assert not summarize(rows[5:]).reaches(-1.0)
