"""A run's report: what the folder holds is on the page, whichever way the run went, and in a browser too."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import needs_chromium, render, visible

from frostline.errors import DataError
from frostline.train.report.page import write_report
from frostline.video import write_video

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def example_metrics() -> list[dict[str, Any]]:
    rows = []
    for step in range(1, 41):
        stages = {"vae_encoder": {"backend": "onnxruntime", "ms": 21.4}, "denoise_tail": {"backend": "torch", "ms": 88}}
        stages["vae_decoder_live"] = {"backend": "onnxruntime, torch", "ms": 310}
        row: dict[str, Any] = {"step": step, "loss": 0.1, "face_score": 0.58 + 0.002 * step, "kl_loss": 1e-4 * step}
        row |= {"detection_rate": 1.0, "learning_rate": 3e-3, "grad_norm": 0.3, "seconds": 0.4, "stages": stages}
        rows.append({**row, "skipped": step == 7})
    rows[10]["face_score"] = None
    rows[11]["kl_loss"] = float("nan")
    return rows


def example_validation(after: float = 0.6639, judge: float = 0.02, looks: int = 2) -> list[dict[str, Any]]:
    """judge: how much the judge rises. The first frame shows a face from the second look on only."""
    lines, before = [], [0.55 + 0.003 * start for start in range(20)]
    for look in range(looks):
        part = look / (looks - 1)
        starts = [score + part * (0.09 - 0.0049 * start) for start, score in enumerate(before)]
        judged = [0.7 + part * judge * (1 + 0.2 * (-1) ** start) for start in range(20)]
        line: dict[str, Any] = {"step": round(40 * part), "psnr": 21.43 - 0.12 * part}
        line |= {"face_score": 0.5785 + part * (after - 0.5785), "detection_rate": 0.983 + 0.017 * part}
        line |= {"judge_face_dlib": 0.7 + part * judge, "judge_face_dlib_detection_rate": 0.9, "sharpness_ratio": 1.1}
        line |= {"motion_ratio": 0.9}
        line |= {"rewards": ["face_score"], "judges": ["judge_face_dlib"]}
        line["starts"] = {"face_score": starts, "judge_face_dlib": judged, "psnr": [21.43 - 0.12 * part] * 20}
        line["frames"] = {"judge_face_dlib": [[None if look == 0 else 0.6, score, score] for score in judged]}
        lines.append(line)
    return lines


FACTS = {
    "rewards": ["face_score"],
    "judges": ["judge_face_dlib"],
    "about": {"face_score": "The mean cosine of faces.", "judge_face_dlib": "Another embedder.", "psnr": "Pixels."},
    "plan": {
        "vae_encoder": {
            "backend": "onnxruntime",
            "reason": "1.81x as fast as torch <parity passed>",
            "parity_max_abs": 9.5e-7,
        },
        "vae_decoder": {"backend": "torch", "reason": "onnxruntime is slower (0.78x)", "parity_max_abs": None},
    },
    "versions": {"python": "3.11.2", "torch": "2.11.0"},
}
TIMING = {
    "step_ms": {"cached": 366.4, "uncached": 441.8, "torch": 561.2},
    "stage_ms": {
        "cached": {},
        "uncached": {"vae_encoder": 21.4, "denoise_tail": 88.1},
        "torch": {"vae_encoder": 38.7, "denoise_tail": 87.6},
    },
}
CONFIG = "lora: {rank: 8}\ntrain: {learning_rate: 0.003}\nnoise_seed: null\n"


def write_run(
    run: Path,
    metrics: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    timing: dict[str, Any] | None = None,
    clips: bool = False,
) -> None:
    """The files of a run, its clips of 20 starts those of a colour."""
    run.mkdir(exist_ok=True)
    for name, lines in (("metrics", metrics), ("validation", validation)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps(FACTS))
    (run / "config.yaml").write_text(CONFIG)
    if timing is not None:
        (run / "timing.json").write_text(json.dumps(timing))
    if clips:
        folder = run / "validation"
        for name in ("truth", "step-000000", "step-000040"):
            for number in range(20):
                write_video(folder / name / f"{number}.mp4", torch.full((3, 3, 32, 32), number / 20))
        with (folder / "step-000040.csv").open("w", newline="") as file:
            rows = [[f"step-000040/{n}.mp4", f"truth/{n}.mp4", f"person {n} nods"] for n in range(20)]
            csv.writer(file).writerows([["video", "reference", "prompt"], *rows])


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


EXPECTED = (
    "40 steps, 1 of them skipped because the loss or its gradient was not finite.",
    "Face score of the held-out starts: 0.579 at step 0, 0.664 now; it went up in 19 of 20.",
    "Gains agree: face_score rises (+0.0435 ± 0.0065, 20 starts) and judge_face_dlib rises (+0.0200 ± 0.00092",
    "Face score 0.579 → 0.664 +0.085 The mean cosine of faces.",
    "Starts that improved 19 of 20",
    "Judge: face dlib 0.700 → 0.720 +0.020 Training never sees it. Another embedder. "
    "Of the 40 frames that were scored both times: +0.0200; of all, with 0 where there was no score: +0.213.",
    "Detection rate 0.983 → 1.000 +0.017",
    f"PSNR to truth, dB 21.43 → 21.31 {MINUS}0.12",
    "Rewarded and judged",
    "Face score in training",
    "Face score: change",
    "Judge: face dlib: change",
    "KL to the untrained model",
    "Sharpness ratio (1 is like the true clip)",
    "Motion ratio (1 is like the true clip)",
    f"One training step 561 → 366 ms 1.53 {TIMES} the speed",
    "442 ms uncached",
    "19 of 20 up",
    f"vae_encoder frozen onnxruntime 21.4 9.5 {TIMES} 10⁻⁷ 1.81x as fast as torch <parity passed>",
    f"denoise_tail live torch 88.0 {DASH} carries gradient",
    f"vae_decoder frozen torch {DASH} {DASH} onnxruntime is slower (0.78x)",
    f"vae_decoder_live live onnxruntime, torch 310 {DASH} carries gradient",
    "One training step, in turns",
    "python 3.11.2",
    "lora.rank 8",
    "train.learning_rate 0.003",
)


def test_every_number_is_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), TIMING, clips=True)
    html = page(tmp_path)
    text = visible(html)
    for words in EXPECTED:
        assert words in text
    # Five starts of twenty, each as it was, before and now.
    assert html.count("<video ") == 15
    assert (tmp_path / "contact_sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_a_run_that_went_wrong_is_told_as_it_is(tmp_path: Path) -> None:
    validation = example_validation(after=0.5, judge=-0.03)
    validation[1] |= {"psnr": 19.0, "detection_rate": 0.5}
    validation[1]["starts"]["face_score"] = [0.0] * 17 + [1.0] * 3
    write_run(tmp_path, example_metrics(), validation, {"step_ms": {"cached": 600.0, "torch": 561.2}})
    html = page(tmp_path)
    text = visible(html)
    assert "0.579 at step 0, 0.500 now; it went up in 3 of 20" in text
    assert f"0.94 {TIMES} the speed" in text
    assert f"Judge_face_dlib falls since step 40 ({MINUS}0.0300 ± 0.0014, 20 starts), and no reward rises" in text
    assert html.count('class="lead worse"') == 1
    # Face score, judge and the step's time: what has no better side is told without a colour.
    assert html.count('class="change worse"') == 3


def test_a_hacked_reward_is_named_at_the_top(tmp_path: Path) -> None:
    validation = example_validation(judge=-0.03, looks=5)
    validation[-1]["verdict"] = {"stops": True}
    write_run(tmp_path, example_metrics(), validation)
    text = visible(page(tmp_path))
    verdict = (
        "The reward rises while a judge falls, reward hacking? face_score rises (+0.0435 ± 0.0065, 20 starts), "
        f"judge_face_dlib falls since step 10 ({MINUS}0.0300 ± 0.0014, 20 starts). The run was ended at step 40, after "
        "4 validations in a row at which a judge fell (train.stop_when_judge_falls)."
    )
    assert text.index(verdict) < text.index("40 steps, 1 of them skipped")


def test_names_of_any_reward_are_told(tmp_path: Path) -> None:
    """Nothing on the page knows which rewards there are."""
    validation = json.loads(json.dumps(example_validation()).replace("face", "tail").replace("detection", "wagging"))
    metrics = json.loads(json.dumps(example_metrics()).replace("face", "tail").replace("detection", "wagging"))
    write_run(tmp_path, metrics, validation)
    text = visible(page(tmp_path))
    for words in ("Tail score 0.579 → 0.664", "Judge: tail dlib", "Tail score while training", "Wagging rate 0.983"):
        assert words in text
    assert "face" not in text.replace("The mean cosine of faces", "")


@pytest.mark.parametrize("validation", [[], example_validation()[:1]], ids=["none", "first"])
def test_a_run_at_work_has_a_page(tmp_path: Path, validation: list[dict[str, Any]]) -> None:
    write_run(tmp_path, example_metrics()[:3], validation)
    text = visible(page(tmp_path))
    assert "3 steps." in text
    assert "One training step 0.40 s" in text
    assert "improved" not in text and "Rewarded and judged" not in text


def test_missing_values_leave_a_page(tmp_path: Path) -> None:
    validation = [{"step": 0, "face_score": None}, {"step": 1, "face_score": None, "starts": {"face_score": [None]}}]
    write_run(tmp_path, [{"step": 1, "loss": None}], validation, {})
    assert "nan" not in visible(page(tmp_path)).lower().split()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not the folder of a run \(no metrics\.jsonl\)"):
        write_report(tmp_path)
    write_run(tmp_path, example_metrics(), [])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: is not valid JSON"):
        write_report(tmp_path)


def test_clips_are_never_taken_from_outside_the_run(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", write_video(tmp_path / "secret.mp4", torch.rand(3, 3, 32, 32))
    write_run(run, example_metrics(), example_validation())
    (run / "validation").mkdir()
    (run / "validation" / "step-000040.csv").write_text(f"video,reference,prompt\n{secret},../../secret.mp4,p\n")
    assert "<video " not in page(run)


@needs_chromium
def test_browser_shows_the_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), TIMING, clips=True)
    dom, said = render(write_report(tmp_path), tmp_path / "profile")
    for words in EXPECTED:
        assert words in visible(dom)
    assert "Content Security Policy" not in said
