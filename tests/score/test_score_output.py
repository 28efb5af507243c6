"""The output of `frostline score`: a table that fits, JSON alone, the decision with its threshold, and failures."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import run_python
from pseudo_terminal import on_terminal

from frostline.score.result import VideoScore
from frostline.score.run import ScoreOutcome
from frostline.score.summary import THRESHOLDS, decide, summarize

FACES = ["--detector", "yunet", "--backend", "torch", "--device", "cpu"]
SOURCE = "models/face_recognition_sface/sface.py"


def rows(scores: Sequence[float | None], embedder: str = "sface", **values: object) -> list[VideoScore]:
    common = {"video": "v", "reference": "r", "settings": "s", "status": "ok", "frames": 2, **values}
    found = [0.0 if score is None else 1.0 for score in scores]
    return [
        VideoScore.model_validate(
            {"index": i, "face_score": score, "detection_rate": rate, "face_embedder": embedder, **common}
        )
        for i, (score, rate) in enumerate(zip(scores, found, strict=True))
    ]


def outcome_of(found: Sequence[VideoScore]) -> ScoreOutcome:
    return ScoreOutcome(tuple(found), summarize(found))


def test_a_decision_counts_videos_from_the_published_threshold_up() -> None:
    failed = VideoScore(index=5, video="v", reference="r", settings="s", status="error", error="no")
    decision = decide([*rows([0.363, 0.3629, 0.9, None]), failed])
    assert decision is not None
    assert (decision.same_person, decision.videos, decision.without_face) == (2, 4, 1)
    assert decision.sentence.startswith("the same person in 2 of 4 videos; 1 without any face")
    assert "0.363" in decision.sentence and SOURCE in decision.sentence and "OpenCV Zoo" in decision.sentence


def test_no_decision_without_a_published_threshold() -> None:
    assert {*THRESHOLDS} == {"sface"}
    for embedder in ("dlib", "facenet:vggface2", "arcface:w600k_r50.onnx"):
        assert decide(rows([0.9], embedder)) is None
    assert decide([*rows([0.9]), *rows([0.9], "dlib")]) is None
    assert decide([]) is None
    assert decide(rows([], "sface")) is None


def test_what_falls_short_is_told_with_numbers() -> None:
    outcome = outcome_of(rows([0.5, 0.3, None]))
    assert outcome.shortfall(0.26) is None
    said = outcome.shortfall(0.4)
    assert said is not None
    assert said.startswith("the mean face_score is 0.267, but must be at least 0.4 (--fail-under)")
    assert said.endswith("1 of 3 videos show no face and count as 0")
    close = outcome_of(rows([0.36299])).shortfall(0.363)
    assert close is not None and "is 0.36299, but must be at least 0.363" in close
    nothing = outcome_of(rows([], "sface")).shortfall(0.1)
    assert nothing == "no video has a face_score, but its mean must be at least 0.1 (--fail-under)"


@pytest.fixture(scope="module")
def pairs(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write pairs of two videos deep in one folder, one of which shows the person of the reference."""
    folder = tmp_path_factory.mktemp("a-project-with-a-long-name") / "validation" / "step-000040"
    folder.mkdir(parents=True)
    for name in ("astronaut.mp4", "hopper.mp4", "face.png"):
        (folder / name).symlink_to(people / name)
    (folder / "pairs.csv").write_text("video,reference\nastronaut.mp4,face.png\nhopper.mp4,face.png\n")
    return folder / "pairs.csv"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_table_names_the_shared_folder_once(columns: int, pairs: Path) -> None:
    arguments = ["score", "--pairs", str(pairs), *FACES, "--fail-under", "0.9"]
    seen = on_terminal("-m", "frostline", *arguments, columns=columns)
    text = "".join(seen.lines).replace(" ", "")
    assert seen.code == 1
    assert text.count(f"{pairs.parent}/") == 1
    for name in ("astronaut.mp4", "hopper.mp4"):
        assert sum(line.startswith(name) for line in seen.lines) == 1
    (head,) = (line for line in seen.lines if line.startswith("video "))
    assert "face score" in head and "frames" in head
    said = " ".join(seen.lines)
    assert "the same person in 1 of 2 videos" in said and SOURCE in said
    assert "error: the mean face_score is 0." in said and "but must be at least 0.9" in said
    assert seen.colours


def test_piped_names_are_whole(pairs: Path) -> None:
    result = run_python("-m", "frostline", "score", "--pairs", str(pairs), *FACES, timeout=200)
    assert result.returncode == 0
    for name in ("astronaut.mp4", "hopper.mp4"):
        (row,) = (line for line in result.stdout.splitlines() if line.startswith(str(pairs.parent / name)))
        assert len(row.split()) == 8
    assert "\x1b" not in result.stdout + result.stderr


def test_json_is_alone_on_standard_output(pairs: Path) -> None:
    arguments = ["-v", "score", "--pairs", str(pairs), *FACES, "--json", "--fail-under", "0.99"]
    result = run_python("-m", "frostline", *arguments, timeout=200)
    assert result.returncode == 1
    values = json.loads(result.stdout)
    assert [Path(row["video"]).name for row in values["rows"]] == ["astronaut.mp4", "hopper.mp4"]
    assert values["rows"][0]["face_score"] > 0.9 > values["rows"][1]["face_score"]
    assert values["summary"]["videos"] == 2
    assert (values["decision"]["same_person"], values["decision"]["threshold"]["cosine"]) == (1, 0.363)
    assert "error: the mean face_score is" in result.stderr and "load the networks" in result.stderr
