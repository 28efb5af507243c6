"""The demo with two steps: all files that it writes, and the numbers in them."""

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel
from typer.testing import CliRunner

from frostline.cli import app
from frostline.demo.run import DemoSettings, demo_settings, run_demo
from frostline.models.checkpoints.loading import load_components
from frostline.progress import Progress
from frostline.score.request import pairs_of_file
from frostline.score.run import RunOptions, run_score
from frostline.score.settings import ScoreSettings
from frostline.train.config_file import load_run_settings
from frostline.train.loop.checkpoint import latest_intact
from frostline.video import read_video


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, engines: Path) -> Path:
    out = tmp_path_factory.mktemp("demo")
    outcome, _ = run_demo(out, engines, DemoSettings(steps=2, starts=2, timed_rounds=1), Progress())
    assert (outcome.step, outcome.stopped_by) == (2, None)
    return out


def test_summary_holds_every_number(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for name in (
        "face_score_before",
        "face_score_after",
        "judge_face_dlib_before",
        "judge_face_dlib_after",
        "detection_rate_before",
        "detection_rate_after",
        "psnr_before",
        "psnr_after",
        "step_ms_cached",
        "step_ms_uncached",
        "step_ms_torch",
        "seconds",
    ):
        assert math.isfinite(summary[name]), name
    assert summary["starts"] == 2
    assert 0 <= summary["starts_up"] <= 2
    # The reward and the judge, each over the frames with a face in both validations.
    assert {*summary["paired"]} == {"face_score", "judge_face_dlib"}
    for change in summary["paired"].values():
        assert (change["since"], change["starts"]) == (0, 2)
        assert 0 < change["frames"] <= 2 * 9
        assert math.isfinite(change["gain"]) and math.isfinite(change["gain_missing_zero"])
    assert "judge_face_dlib" in summary["verdict"]


def test_it_leaves_what_every_run_leaves(demo: Path) -> None:
    """Check the trainer's own files, with which the report can be written again, and the run can be resumed."""
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["kl_loss"] == pytest.approx(0, abs=1e-10)
    assert lines[1]["kl_loss"] > 0
    plan = json.loads((demo / "run.json").read_text())["plan"]
    assert plan["denoiser"]["backend"] in ("onnxruntime", "torch")
    assert any(
        choice["backend"] == "onnxruntime" and choice["parity"]["onnxruntime"] < 1e-4 for choice in plan.values()
    )
    restored = load_run_settings(demo / "config.yaml")
    assert restored == demo_settings(demo, restored.plan.engines, DemoSettings(steps=2, starts=2))
    latest = latest_intact(demo)
    assert latest is not None
    assert latest.step == 2


def test_the_trainer_makes_its_page_again(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    for words in ("Rewards and judges", "Validation samples", "vae_encoder", "Latency of one training step", "step 2"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (demo / "report.html").unlink()
    assert CliRunner().invoke(app, ["report", str(demo)]).exit_code == 0
    assert (demo / "report.html").read_text() == page
    assert (demo / "contact_sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_data_and_clips_are_real_videos(demo: Path) -> None:
    assert (demo / "data" / "train" / "metadata.csv").read_text().splitlines()[0] == "video,prompt"
    assert read_video(demo / "data" / "train" / "clip_000.mp4").shape == (9, 3, 96, 96)
    for name in ("truth", "step-000000", "step-000002"):
        for number in range(2):
            assert len(read_video(demo / "validation" / name / f"{number}.mp4")) == 9


@pytest.mark.parametrize(("when", "step"), [("before", 0), ("after", 2)])
def test_its_clips_score_as_it_said(when: str, step: int, demo: Path, engines: Path) -> None:
    """Compare with a tolerance: written pixels are rounded to 8 bits, but the demo embedded floats."""
    summary = json.loads((demo / "summary.json").read_text())
    options = RunOptions(device="cpu", engines=engines)
    pairs = pairs_of_file(demo / "validation" / f"step-{step:06d}.csv")
    outcome = run_score(pairs, ScoreSettings(), options, Progress())
    assert outcome is not None and outcome.summary.failed == 0
    assert outcome.summary.detection_rate == pytest.approx(summary[f"detection_rate_{when}"])
    scores = [row.face_score for row in outcome.rows]
    assert scores == pytest.approx(summary[f"face_scores_{when}"], abs=5e-3)


def test_adapter_loads_into_plain_peft(demo: Path) -> None:
    model = PeftModel.from_pretrained(load_components("tiny").denoiser, str(demo / "adapter"))
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)
