"""Videos scored with several rewards: compared with plain scripts, on engines, and if one reward has no score."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve
from score_videos import moving
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Model
from vision_files import write_clip, write_dinov2

from frostline.errors import ConfigError
from frostline.progress import Progress
from frostline.score import decoding
from frostline.score.files import ResultFile
from frostline.score.report import write_score_report
from frostline.score.request import Pair
from frostline.score.result import VideoScore, columns
from frostline.score.rewards import clips
from frostline.score.rewards.features import StreamedSelection
from frostline.score.run import RunOptions, ScoreOutcome, run_score
from frostline.score.settings import ScoreSettings
from frostline.video import read_video, write_video

NAMES = ("astronaut", "hopper", "half")
PROMPTS = {"astronaut": "a person on persons", "hopper": "Cats & cat", "half": ""}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """Return a model of transformers, and the folder in which it was saved."""
    folder = tmp_path_factory.mktemp("clip")
    return write_clip(folder), folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dinov2Model, Path]:
    """Return a model of transformers, and the folder in which it was saved."""
    folder = tmp_path_factory.mktemp("dinov2")
    return write_dinov2(folder), folder


def score(pairs: list[Pair], *rewards: dict[str, Any], **options: Any) -> ScoreOutcome:
    settings = {name: options.pop(name) for name in ("every", "max_frames", "detector") if name in options}
    run = RunOptions(**{"backend": "torch", "device": "cpu", "overwrite": not options.get("resume"), **options})
    outcome = run_score(pairs, ScoreSettings.parse({"rewards": rewards, **settings}), run, Progress())
    assert outcome is not None
    return outcome


def pairs_of(people: Path, *names: str, reference: str = "hopper.mp4") -> list[Pair]:
    return [
        Pair(index, str(people / f"{name}.mp4"), str(people / reference), PROMPTS.get(name, "a cat"))
        for index, name in enumerate(names)
    ]


@torch.no_grad()
def plain_clip(model: CLIPModel, folder: Path, video: str, prompt: str) -> float:
    """Compute the score like a plain script."""
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    logits = []
    for frame in read_video(video):
        pixels = processor(images=Image.fromarray(frame.permute(1, 2, 0).numpy()), return_tensors="pt")
        logits.append(model(**pixels, **tokenizer([prompt], return_tensors="pt")).logits_per_image.item())
    return float(np.mean(logits))


@torch.no_grad()
def plain_consistency(model: Dinov2Model, folder: Path, video: str) -> float:
    """Compute VBench's subject consistency, frame by frame."""
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = []
    for frame in read_video(video):
        pixels = processor(images=Image.fromarray(frame.permute(1, 2, 0).numpy()), return_tensors="pt")
        seen.append(torch.nn.functional.normalize(model(**pixels).last_hidden_state[0, 0], dim=0))
    likeness = [(max(0, float(seen[0] @ b)) + max(0, float(a @ b))) / 2 for a, b in pairwise(seen)]
    return float(np.mean(likeness))


def plain_motion(frames: torch.Tensor) -> float:
    luma = np.tensordot(frames.double().numpy() / 255, (0.299, 0.587, 0.114), axes=([1], [0]))
    return float(np.abs(np.diff(luma, axis=0)).mean()) + 1e-4


def plain_sharpness(frames: torch.Tensor) -> float:
    luma = np.tensordot(frames.double().numpy() / 255, (0.299, 0.587, 0.114), axes=([1], [0]))
    kernel = np.array([[[0, 1, 0], [1, -4, 1], [0, 1, 0]]])
    return float((convolve(luma, kernel)[:, 1:-1, 1:-1] ** 2).mean()) + 1e-6


def plain_change(frames: torch.Tensor) -> float:
    return (frames[1:].double() - frames[:-1].double()).abs().mean().item() / 255


@pytest.mark.parametrize("batch", [2, 32])
def test_gives_what_plain_scripts_give(
    batch: int,
    people: Path,
    clip: tuple[CLIPModel, Path],
    dinov2: tuple[Dinov2Model, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compute every reward in one pass, with chunks of three frames, across which neighbouring frames are compared."""
    monkeypatch.setattr(decoding, "_CHUNK_FRAMES", 3)
    model, folder = clip
    pairs = [*pairs_of(people, *NAMES)]
    entries = [
        {"type": "face_identity", "detector": "yunet"},
        {"type": "clip", "weights": str(folder)},
        {"type": "subject_consistency", "weights": str(dinov2[1])},
        {"type": "motion"},
        {"type": "sharpness"},
        {"type": "own_rewards:Change"},
        {"type": "own_rewards:Brightness"},
    ]
    outcome = score(pairs, *entries, batch=batch)
    names = ("face_score", "clip", "subject_consistency", "motion", "sharpness", "change", "brightness")
    assert outcome.labels == names
    moving_reference = read_video(pairs[0].reference)
    (faces,) = [score(pairs, entries[0], batch=batch).rows]
    reference = read_video(pairs[0].reference)[1:]
    for row, face, pair in zip(outcome.rows, faces, pairs, strict=True):
        frames = read_video(pair.video)
        assert (row.status, row.frames, row.width) == ("ok", len(frames), frames.shape[-1])
        assert row.model_copy(update={"scores": {}, "backends": "", "seconds": 0, "settings": "", "note": ""}) == (
            face.model_copy(update={"seconds": 0, "settings": "", "note": ""})
        )
        if pair.prompt:
            assert row.scores["clip"] == pytest.approx(plain_clip(model, folder, pair.video, pair.prompt), rel=1e-4)
        else:
            assert "clip" not in row.scores and "clip: needs a prompt" in row.note
        assert row.scores["subject_consistency"] == pytest.approx(plain_consistency(*dinov2, pair.video), abs=1e-4)
        ratio = plain_motion(frames) / plain_motion(moving_reference)
        assert row.scores["motion"] == pytest.approx(-(np.log(ratio) ** 2), abs=1e-4)
        ratio = plain_sharpness(frames) / plain_sharpness(reference)
        assert row.scores["sharpness"] == pytest.approx(-(np.log(ratio) ** 2), abs=1e-4)
        assert row.scores["sharpness_ratio"] == pytest.approx(ratio, rel=1e-4)
        ratio = plain_change(frames) / plain_change(reference)
        assert row.scores["change"] == pytest.approx(np.log(ratio), abs=1e-4)
        assert row.scores["change_rows"] == len(frames) - 1
        assert row.scores["brightness"] == pytest.approx(frames.double().mean().item() / 255, abs=1e-5)
    backends = "clip.clip_image=torch clip.clip_text=torch subject_consistency.subject_consistency_image=torch"
    assert outcome.rows[0].backends == backends


def test_engines_are_built_verified_and_found_again(people: Path, clip: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    pairs, entry = pairs_of(people, *NAMES[:2]), {"type": "clip", "weights": str(clip[1])}
    expected = score(pairs, entry).rows
    stamps = []
    for _ in range(2):
        rows = score(pairs, entry, backend="onnxruntime", engines=tmp_path).rows
        assert rows[0].backends == "clip.clip_image=onnxruntime clip.clip_text=onnxruntime"
        for row, plain in zip(rows, expected, strict=True):
            assert row.scores["clip"] == pytest.approx(plain.scores["clip"], rel=1e-4)
        stamps.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx")})
    assert len(stamps[0]) == 2 and stamps[0] == stamps[1], "engines must be built once"


def test_one_reward_without_a_score_leaves_the_others(people: Path, tmp_path: Path) -> None:
    """Test a picture for a reward of neighbours, a still video, a reward that fails, and a score of nan."""
    still = write_video(tmp_path / "still.mp4", moving("astronaut", 1).expand(3, -1, -1, -1), lossless=True)
    pairs = [Pair(i, str(path), str(people / "half.mp4")) for i, path in enumerate((people / "face.png", still))]
    pairs += pairs_of(people, "half", "absent")
    pairs = [Pair(index, pair.video, str(people / "half.mp4")) for index, pair in enumerate(pairs)]
    length = {"type": "own_rewards:Length", "options": {"fails_at": 6}}
    outcome = score(pairs, {"type": "own_rewards:Change"}, length, {"type": "sharpness"})
    picture, same, half, absent = outcome.rows
    assert [row.status for row in outcome.rows] == ["ok", "ok", "ok", "error"]
    assert {*picture.scores} == {"sharpness", "sharpness_ratio"}
    assert picture.note == "change: needs 2 consecutive frames, but there is 1; length: the score is nan"
    assert {*same.scores} == {"change_ratio", "change_rows", "length", "sharpness", "sharpness_ratio"}
    assert same.note == "change: nothing moves" and same.scores["length"] == 3
    assert half.note == "length: ValueError: 6 frames" and "length" not in half.scores
    assert absent.error.endswith("no such file") and absent.scores == {}
    assert (outcome.summary.failed, outcome.summary.scores["change"].videos) == (1, 1)


def test_a_video_that_no_reward_can_score_is_an_error(people: Path) -> None:
    pair = Pair(0, str(people / "face.png"), "")
    (row,) = score([pair], {"type": "own_rewards:Length"}).rows
    assert (row.status, row.error) == ("error", "the score is nan")


def test_a_bad_reference_fails_the_rewards_that_need_it(people: Path) -> None:
    (pair,) = pairs_of(people, "half", reference="absent.mp4")
    other = Pair(1, str(people / "half.mp4"), str(people / "half.mp4"))
    row, _ = score([pair, other], {"type": "sharpness"}, {"type": "own_rewards:Length"}).rows
    assert row.status == "ok" and row.scores == {"length": 6}
    assert row.note == f"sharpness: the reference cannot be used: {people}/absent.mp4: no such file"
    row, _ = score([pair, other], {"type": "sharpness"}, {"type": "own_rewards:Change"}).rows
    assert row.status == "error" and row.error == f"the reference cannot be used: {people}/absent.mp4: no such file"


def test_a_whole_clip_is_kept_within_a_bound(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "CLIP_BYTES", 5 * 3 * 160 * 160 * 4)
    rows = score(pairs_of(people, "astronaut", "half"), {"type": "own_rewards:Length"}).rows
    assert [row.scores.get("length") for row in rows] == [5, None]
    assert rows[1].error.startswith("the reward needs a whole clip, but its frames exceed")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_files_have_a_column_for_each_score(suffix: str, people: Path, tmp_path: Path) -> None:
    """Test also if the first row does not have all metrics, and when resuming."""
    pairs = pairs_of(people, "absent", "astronaut", "half")
    entries = [{"type": "own_rewards:Change"}, {"type": "sharpness"}]
    out = tmp_path / f"scores{suffix}"
    rows = score(pairs, *entries, out=out).rows
    file = ResultFile(out, ("change", "sharpness"), faces=False)
    assert file.read() == list(rows)
    names = columns(("change", "change_ratio", "change_rows", "sharpness", "sharpness_ratio"), faces=False)
    assert "face_score" not in names and names.index("change") == names.index("note") + 1
    lines = out.read_text().splitlines()
    assert (tuple(lines[0].split(",")) if suffix == ".csv" else tuple(json.loads(lines[-1]))) == names
    out.write_text("".join(line + "\n" for line in lines[:-1]))
    again = score(pairs, *entries, out=out, resume=True).rows
    assert [row.scores for row in again] == [row.scores for row in rows]
    assert file.read() == list(again)
    with pytest.raises(ConfigError, match=r"other settings .*floor.*1e-06.*0\.5"):
        score(pairs, entries[0], {"type": "sharpness", "floor": 0.5}, out=out, resume=True)
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert summary["scores"]["sharpness"]["videos"] == 2 and "histogram" not in summary


def test_results_of_other_prompts_are_not_gone_on_from(
    people: Path, clip: tuple[CLIPModel, Path], tmp_path: Path
) -> None:
    entry, (pair,) = {"type": "clip", "weights": str(clip[1])}, pairs_of(people, "hopper")
    score([pair], entry, out=tmp_path / "scores.csv")
    with pytest.raises(ConfigError, match=r"other prompts \('Cats & cat' of .*, now 'a dog'\)"):
        score([Pair(0, pair.video, pair.reference, "a dog")], entry, out=tmp_path / "scores.csv", resume=True)


def test_what_does_not_go_together_is_refused(people: Path) -> None:
    pairs = pairs_of(people, "half")
    with pytest.raises(ConfigError, match="two rewards have the name 'sharpness'"):
        score(pairs, {"type": "sharpness"}, {"type": "sharpness", "floor": 0.1})
    with pytest.raises(ConfigError, match="detector: is a setting of the reward face_identity, which is not one of"):
        score(pairs, {"type": "sharpness"}, detector="yunet")
    with pytest.raises(
        ConfigError, match="detector: is yunet in the score settings, but mtcnn in rewards: set only one"
    ):
        score(pairs, {"type": "face_identity", "detector": "mtcnn"}, detector="yunet")
    with pytest.raises(ConfigError, match="scores all frames of a file"):
        score(pairs, {"type": "face_identity", "frames": "first"})


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("first", [0]),
        ("last", [6]),
        ("every:3", [0, 3, 6]),
        ("random:2", [1, 5]),
        ("random:9", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_frames_are_selected_as_they_come(selection: str, chosen: list[int]) -> None:
    streamed, frames = StreamedSelection(selection), torch.arange(7)
    rows = torch.cat([streamed.among(part) for part in frames.split([2, 1, 4])])
    assert streamed.of_all(rows).tolist() == chosen


def test_the_report_shows_every_score(people: Path, tmp_path: Path) -> None:
    entries = [{"type": "sharpness"}, {"type": "own_rewards:Change"}]
    outcome = score(pairs_of(people, "astronaut", "half"), *entries)
    settings = ScoreSettings.parse({"rewards": entries})
    write_score_report(tmp_path / "report.html", outcome, settings)
    page = (tmp_path / "report.html").read_text()
    for row in outcome.rows:
        assert all(f"{value:.3f}".replace("-", "\N{MINUS SIGN}") in page for value in row.scores.values())
    assert "How good are the videos?" in page and "Videos by change_ratio" in page and "Face score" not in page


def test_scores_are_flat_in_files_alone() -> None:
    row = VideoScore(index=0, video="v", reference="r", status="ok", settings="s", scores={"clip": 0.25})
    line = row.json_line(columns(("clip", "clip_other"), faces=False))
    assert json.loads(line)["clip"] == 0.25 and json.loads(line)["clip_other"] is None
    assert VideoScore.of_json_line(line) == row
    with pytest.raises(ValueError, match="valid number"):
        VideoScore.of_json_line(line.replace("0.25", '"much"'))
    with pytest.raises(ValueError, match="finite"):
        row.model_validate({**row.model_dump(), "scores": {"clip": float("nan")}})


def test_the_command_scores_without_a_reference(
    people: Path, clip: tuple[CLIPModel, Path], tmp_path: Path, refused_usage: Callable[..., str]
) -> None:
    from typer.testing import CliRunner

    from frostline.cli import app

    (tmp_path / "rewards.yaml").write_text("model: tiny\nrewards:\n  - {type: 'own_rewards:Length', weight: 2}\n")
    common = [str(people / "half.mp4"), "--reward", f"clip:{clip[1]}", "--rewards-file", str(tmp_path / "rewards.yaml")]
    arguments = ["score", *common, "--prompt", "a cat", "--backend", "torch", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--fail-under", "length=6"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "length: mean 6.000" in result.stdout and "clip: mean" in result.stdout
    assert CliRunner().invoke(app, [*arguments, "--fail-under", "7"]).exit_code == 1
    assert "no such score" in refused_usage(*arguments, "--fail-under", "motion=1")
    assert "must be a number, or COLUMN=NUMBER" in refused_usage(*arguments, "--fail-under", "length")
    assert "the rewards need prompts" in refused_usage("score", *common)
    assert "--reference is missing" in refused_usage("score", *common, "--reward", "sharpness", "--prompt", "a cat")
