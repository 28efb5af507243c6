"""The demo's report: the summary's numbers are on the page, with their units, whichever way the run went."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import torch
from browser import needs_chromium, render

from frostline.demo.report import write_demo_report
from frostline.report.sheet import SheetRow, contact_sheet
from frostline.video import write_video


def example_summary() -> dict[str, Any]:
    before = [0.55 + 0.003 * start for start in range(20)]
    after = [score + 0.09 - 0.0049 * start for start, score in enumerate(before)]
    return {
        "face_score_before": 0.5785,
        "face_score_after": 0.6639,
        "face_scores_before": before,
        "face_scores_after": after,
        "starts": 20,
        "starts_up": 19,
        "detection_rate_before": 0.983,
        "detection_rate_after": 1.0,
        "psnr_before": 21.43,
        "psnr_after": 21.31,
        "step_ms_hybrid": 366.4,
        "step_ms_hybrid_uncached": 441.8,
        "step_ms_torch": 561.2,
        "seconds": 217.3,
        "stages": [
            {
                "stage": "vae_encoder",
                "use": "frozen",
                "backend": "onnxruntime",
                "hybrid_ms": 21.4,
                "torch_ms": 38.7,
                "parity_max_abs": 9.5e-7,
                "reason": "fastest of 2 measured <parity passed>",
            },
            {
                "stage": "denoiser",
                "use": "live",
                "backend": "torch",
                "hybrid_ms": 88.1,
                "torch_ms": 87.6,
                "parity_max_abs": None,
                "reason": "carries gradient",
            },
        ],
        "device": "x86_64, 2 cores",
        "versions": {"python": "3.11.2", "torch": "2.11.0"},
        "settings": {"lora": {"rank": 8}, "learning_rate": 3e-3, "noise_seed": None, "steps": 40},
    }


def example_metrics() -> list[dict[str, Any]]:
    rows = []
    for step in range(1, 41):
        row: dict[str, Any] = {"step": step, "loss": 0.1, "face_score": 0.58 + 0.002 * step, "kl_loss": 1e-4 * step}
        rows.append(row | {"detection_rate": 1.0, "learning_rate": 3e-3, "grad_norm": 0.3, "seconds": 0.4})
    rows[10]["face_score"] = None
    rows[11]["kl_loss"] = float("nan")
    return rows


def write(folder: Path, summary: dict[str, Any], metrics: list[dict[str, Any]], shape: tuple[int, int]) -> Path:
    height, width = shape
    video = torch.rand(5, 3, height, width)
    names = ("truth", "before", "after")
    sheet = contact_sheet([SheetRow("a person nods", dict.fromkeys(names, video))], folder / "sheet.png")
    clips = {name: write_video(folder / f"{name}.mp4", video) for name in names}
    write_demo_report(folder / "report.html", summary, metrics, sheet, clips)
    return folder / "report.html"


def visible(html: str) -> str:
    """What a reader sees, one space between words."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


EXPECTED = (
    "face score rose from 0.579 to 0.664, and 19 of 20 clips keep the face better than before",
    "1.27 times as fast as in PyTorch alone, and 1.53 times with",
    "Face score 0.579 → 0.664 +0.085",
    "Clips that improved 19 of 20",
    "Detection rate 98.3 → 100.0 % +1.7 points",
    "PSNR to truth 21.43 → 21.31 dB \N{MINUS SIGN}0.12 dB",
    "One training step 561 → 366 ms 1.53 \N{MULTIPLICATION SIGN} the speed",
    "442 ms when nothing is kept",
    "The whole demo 3 min 37 s",
    "19 of 20 up",
    "vae_encoder frozen onnxruntime 21.4 38.7 1.81 \N{MULTIPLICATION SIGN} 9.5 \N{MULTIPLICATION SIGN} 10⁻⁷",
    "<parity passed>",
    "denoiser live torch 88.1 87.6 0.99 \N{MULTIPLICATION SIGN} \N{EN DASH} carries gradient",
    "device x86_64, 2 cores",
    "lora rank: 8",
    "learning_rate 0.003",
)


def test_every_number_is_on_the_page(tmp_path: Path) -> None:
    html = write(tmp_path, example_summary(), example_metrics(), (32, 32)).read_text(encoding="utf-8")
    text = visible(html)
    for words in EXPECTED:
        assert words in text
    assert html.count("<video ") == 3
    assert html.count("<svg ") == 6
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_wide_clips_stand_one_above_the_other(tmp_path: Path) -> None:
    html = write(tmp_path, example_summary(), example_metrics(), (32, 160)).read_text(encoding="utf-8")
    assert html.count('<figure class="clip"><div class="scroll wide"') == 3
    assert "--columns: 6" not in html


def test_a_run_that_went_wrong_is_told_as_it_is(tmp_path: Path) -> None:
    summary = example_summary() | {
        "face_score_after": 0.5,
        "starts_up": 3,
        "psnr_after": 19.0,
        "detection_rate_after": 0.5,
        "step_ms_hybrid": 600.0,
        "step_ms_hybrid_uncached": 700.0,
    }
    html = write(tmp_path, summary, example_metrics(), (32, 32)).read_text(encoding="utf-8")
    text = visible(html)
    assert "face score fell from 0.579 to 0.500, and 3 of 20 clips" in text
    assert "0.80 times as fast as in PyTorch alone" in text
    assert html.count('class="change worse"') == 4


def test_missing_values_leave_a_page(tmp_path: Path) -> None:
    summary = {"face_score_before": None, "face_score_after": float("nan"), "stages": []}
    text = visible(write(tmp_path, summary, [], (32, 32)).read_text(encoding="utf-8"))
    assert "The face score could not be measured." in text
    assert "nan" not in text.lower().split()
    assert "no values" in text


@needs_chromium
def test_browser_shows_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, example_summary(), example_metrics(), (32, 32))
    dom, log = render(path, tmp_path / "profile")
    text = visible(dom)
    for words in EXPECTED:
        assert words in text
    assert "Content Security Policy" not in log
