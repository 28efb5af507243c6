"""The demo, two steps long: every file it promises, with the numbers in them."""

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel

from frostline.demo.run import DemoSettings, run_demo
from frostline.models.loading import load_components
from frostline.progress import Progress
from frostline.score.request import pairs_of_file
from frostline.score.run import RunOptions, run_score
from frostline.score.settings import ScoreSettings
from frostline.video import read_video


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, engines: Path) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run_demo(out, engines, DemoSettings(steps=2, starts=2, timed_rounds=1), Progress())
    return out


def test_summary_holds_every_number(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for name in (
        "face_score_before",
        "face_score_after",
        "detection_rate_before",
        "detection_rate_after",
        "psnr_before",
        "psnr_after",
        "step_ms_hybrid",
        "step_ms_torch",
        "seconds",
    ):
        assert math.isfinite(summary[name]), name
    assert summary["starts"] == 2
    assert 0 <= summary["starts_up"] <= 2
    stages = {row["stage"]: row for row in summary["stages"]}
    assert stages["denoiser"]["backend"] in ("onnxruntime", "torch")
    assert stages["denoise_tail"]["use"] == "live"
    assert any(row["backend"] == "onnxruntime" and row["parity_max_abs"] is not None for row in stages.values())


def test_metrics_have_a_line_a_step(demo: Path) -> None:
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["kl_loss"] == pytest.approx(0, abs=1e-10)
    assert lines[1]["kl_loss"] > 0


def test_data_and_clips_are_real_videos(demo: Path) -> None:
    assert (demo / "data" / "train" / "metadata.csv").read_text().splitlines()[0] == "video,prompt"
    assert read_video(demo / "data" / "train" / "clip_000.mp4").shape == (9, 3, 96, 96)
    for name in ("truth", "before", "after"):
        assert len(read_video(demo / f"{name}.mp4")) == 9


@pytest.mark.parametrize("when", ["before", "after"])
def test_its_clips_score_as_it_said(when: str, demo: Path, engines: Path) -> None:
    """But for the rounding of written pixels to 8 bits, which the demo embedded as floats."""
    summary = json.loads((demo / "summary.json").read_text())
    options = RunOptions(device="cpu", engines=engines)
    outcome = run_score(pairs_of_file(demo / f"{when}.csv"), ScoreSettings(), options, Progress())
    assert outcome is not None and outcome.summary.failed == 0
    assert outcome.summary.detection_rate == pytest.approx(summary[f"detection_rate_{when}"])
    scores = [row.face_score for row in outcome.rows]
    assert scores == pytest.approx(summary[f"face_scores_{when}"], abs=5e-3)


def test_pictures_and_report_are_there(demo: Path) -> None:
    assert (demo / "contact_sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (demo / "report.html").read_text()
    assert "vae_encoder" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_adapter_loads_into_plain_peft(demo: Path) -> None:
    model = PeftModel.from_pretrained(load_components("tiny").denoiser, str(demo / "adapter"))
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)
