"""The report of a run: everything in the folder is on the page, for any outcome of the run, and in a real browser."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import needs_chromium, printed, render, visible

from frostline.errors import DataError
from frostline.train.report.page import write_report
from frostline.video import write_video

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def stage(**backends: tuple[int, float]) -> dict[str, Any]:
    """Return the entry of a stage in a line of metrics: calls and milliseconds by backend."""
    served = {backend: {"calls": calls, "ms": ms} for backend, (calls, ms) in backends.items()}
    return {"backend": ", ".join(served), "ms": sum(ms for _, ms in backends.values()), "backends": served}


def example_metrics() -> list[dict[str, Any]]:
    """Return metrics of 40 steps. ONNX Runtime runs the VAE encoder in the first 20; the others use the cache."""
    rows = []
    for step in range(1, 41):
        stages = {"vae_encoder": stage(onnxruntime=(2, 21.4))} if step <= 20 else {}
        stages |= {"denoiser": stage(torch=(5, 40.0)), "denoise_tail": stage(torch=(4, 88))}
        stages["vae_decoder_live"] = stage(onnxruntime=(1, 200.0), torch=(1, 110.0))
        row: dict[str, Any] = {"step": step, "loss": 0.1, "face_score": 0.58 + 0.002 * step, "kl_loss": 1e-4 * step}
        row |= {"detection_rate": 1.0, "learning_rate": 3e-3, "grad_norm": 0.3, "stages": stages}
        row |= {"seconds": 70.0 if step == 1 else 0.4, "peak_memory_gb": 1.5 + 0.01 * step}
        rows.append({**row, "skipped": step == 7})
    rows[10]["face_score"] = None
    rows[11]["kl_loss"] = float("nan")
    return rows


def example_validation(after: float = 0.6639, judge: float = 0.02, looks: int = 2) -> list[dict[str, Any]]:
    """Return lines of validation.jsonl.

    The first frame shows a face only from the second validation on.

    Args:
        after: the face score of the last validation.
        judge: the increase of the judge's score.
        looks: the number of validations.
    """
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
        "text_encoder": {"backend": "onnxruntime", "reason": "4x", "parity": {"onnxruntime": 5e-7}},
        "vae_encoder": {
            "backend": "torch",
            "reason": "no engine supports this shape",
            "reasons": {
                "onnxruntime": "1.81x as fast as torch <parity passed>",
                "torch": "no engine supports this shape",
            },
            "parity": {"onnxruntime": 9.5e-7, "openvino": 3.3e-3},
        },
        "denoiser": {"backend": "onnxruntime", "reason": "3.34x as fast", "parity": {"onnxruntime": 2.9e-6}},
        "vae_decoder": {"backend": "torch", "reason": "onnxruntime is slower (0.78x)", "parity": {"onnxruntime": 2e-5}},
    },
    "versions": {"python": "3.11.2", "torch": "2.11.0"},
    "machine": {"processor": "AMD EPYC 9654, 2 cores", "gpu": "NVIDIA H200, 141 GB"},
    "changed_settings": ["lora.rank", "rewards.0.baseline"],
    "sessions": [
        {
            "command": "frostline train my.yaml",
            "began": "2026-11-29T21:00:00+00:00",
            "until": "2026-11-29T21:02:30+00:00",
            "first_step": 0,
            "last_step": 20,
            "validation_calls": {"vae_decoder": {"torch": 4}},
        },
        {
            "command": "frostline train --resume runs/my",
            "began": "2026-11-29T22:00:00+00:00",
            "until": "2026-11-29T22:00:45+00:00",
            "first_step": 20,
            "last_step": 40,
            "validation_calls": {"vae_decoder": {"torch": 3}},
        },
    ],
}
TIMING = {
    "step_ms": {"cached": 366.4, "uncached": 441.8, "torch": 561.2},
    "stage_ms": {
        "cached": {},
        "uncached": {"vae_encoder": 21.4, "denoise_tail": 88.1},
        "torch": {"vae_encoder": 38.7, "denoise_tail": 87.6},
    },
}
CONFIG = (
    "model: tiny\nlora: {rank: 8}\ntrain: {learning_rate: 0.003}\nnoise_seed: null\n"
    "rewards: [{type: face_identity, baseline: 0.54}]\n"
)


def write_run(
    run: Path,
    metrics: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    timing: dict[str, Any] | None = None,
    clips: bool = False,
) -> None:
    """Write the files of a run, with 20 samples whose clips have one grey level each."""
    run.mkdir(exist_ok=True)
    for name, lines in (("metrics", metrics), ("validation", validation)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps(FACTS))
    (run / "config.yaml").write_text(CONFIG)
    if timing is not None:
        (run / "timing.json").write_text(json.dumps(timing))
    for name in ("adapter", "checkpoint-20"):
        (run / name).mkdir(exist_ok=True)
    if clips:
        folder = run / "validation"
        for name in ("truth", "step-000000", "step-000040"):
            for number in range(20):
                write_video(folder / name / f"{number}.mp4", torch.full((3, 3, 32, 32), number / 20))
        with (folder / "step-000040.csv").open("w", newline="") as file:
            rows = [[f"step-000040/{n}.mp4", f"truth/{n}.mp4", f"a person {n} nods"] for n in range(20)]
            csv.writer(file).writerows([["video", "reference", "prompt"], *rows])


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


EXPECTED = (
    "40 steps, 1 of them skipped because the loss or its gradient was not finite.",
    "Face score of the validation samples: 0.579 at step 0, 0.664 now; it went up in 19 of 20.",
    "Gains agree: face_score rises (+0.0435 ± 0.0065, 20 samples) and judge_face_dlib rises (+0.0200 ± 0.00092",
    "Face score 0.579 → 0.664 +0.085 The mean cosine of faces.",
    "Samples that improved 19 of 20",
    "Judge: face dlib 0.700 → 0.720 +0.020 Not used in training. Another embedder. "
    "Change in the 40 frames that were scored both times: +0.0200; in all frames, with 0 for frames without a score: "
    "+0.213.",
    "Detection rate 0.983 → 1.000 +0.017",
    f"PSNR to ground truth, dB 21.43 → 21.31 {MINUS}0.12",
    "Rewards and judges",
    "Face score in training",
    "Face score: change",
    "Judge: face dlib: change",
    "KL divergence from the base model",
    "Sharpness ratio (1 is like the true clip)",
    "Motion ratio (1 is like the true clip)",
    f"One training step 561 → 366 ms 1.53 {TIMES} the speed",
    "442 ms uncached",
    "19 of 20 up",
    f"vae_encoder frozen onnxruntime 20 of 40 40 0 21.4 9.5 {TIMES} 10⁻⁷ 1.81x as fast as torch <parity passed>",
    f"denoiser frozen torch 40 of 40 200 0 40.0 {DASH}",
    f"vae_decoder frozen torch 0 of 40 0 7 {DASH} {DASH} onnxruntime is slower (0.78x)",
    f"denoise_tail live torch 40 of 40 160 0 88.0 {DASH} PyTorch computes the gradient",
    f"vae_decoder_live live onnxruntime 40 of 40 40 0 200 2.0 {TIMES} 10⁻⁵ PyTorch computes the gradient",
    f"vae_decoder_live live torch 40 of 40 40 0 110 {DASH} PyTorch computes the gradient",
    f"text_encoder frozen {DASH} 0 of 40 {DASH} {DASH} {DASH} {DASH} not called",
    "a person 19 nods sample 19 · the largest decrease",
    f"Face score 0.607 → 0.604 {MINUS}0.003",
    "a person 0 nods sample 0 · the largest increase",
    "Face score 0.550 → 0.640 +0.090",
    "baseline 0.540",
    "The first step after each start, which loads engines, is left out: 70.0, 0.4 s.",
    "The stages of one training step",
    "vae_decoder_live 310 ms",
    "began 2026-11-29 21:00:00 UTC",
    "last saved, in session 2 2026-11-29 22:00:45 UTC",
    "wall-clock time 3 min 15 s",
    "command frostline train my.yaml",
    "command 2 frostline train --resume runs/my",
    "processor AMD EPYC 9654, 2 cores",
    "gpu NVIDIA H200, 141 GB",
    "Latency of one training step",
    "python 3.11.2",
    "lora.rank 8",
    "rewards.0.baseline 0.54",
    "model tiny",
    "3 settings with their defaults",
    "train.learning_rate 0.003",
)


def test_every_number_is_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), TIMING, clips=True)
    html = page(tmp_path)
    text = visible(html)
    for words in EXPECTED:
        assert words in text
    # Six of twenty samples, each with three clips: before training, after it, and the ground truth.
    assert html.count("<video ") == 18 and html.count("<article ") == 6
    assert "controls" not in re.findall(r"<video [^>]{0,200}", html)[0]
    assert (tmp_path / "contact_sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'src="([^"]{0,40})', html))
    links = [link for link in re.findall(r'href="([^"]+)"', html) if not link.startswith("#")]
    assert {"./adapter", "./checkpoint-20", "./metrics.jsonl"} <= {*links}
    assert all((tmp_path / link).exists() for link in links)


def test_what_did_not_run_is_not_said_to_have_run(tmp_path: Path) -> None:
    """The plan names an engine of the denoiser, but PyTorch ran it in all 40 steps."""
    write_run(tmp_path, example_metrics(), example_validation())
    text = visible(page(tmp_path))
    assert "denoiser frozen onnxruntime" not in text and "3.34x as fast" not in text
    # Only parities of engines that ran are shown.
    assert f"2.9 {TIMES} 10⁻⁶" not in text and f"3.3 {TIMES} 10⁻³" not in text and f"5.0 {TIMES} 10⁻⁷" not in text


def test_the_worst_and_the_best_change_come_first(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), clips=True)
    shown = re.findall(r"a person \d+ nods sample (\d+)", visible(page(tmp_path)))
    assert shown == ["19", "0", "18", "1", "17", "2"]


def test_each_frame_has_its_number_and_score(tmp_path: Path) -> None:
    validation = example_validation()
    for line in validation:
        scores = line["starts"]["face_score"]
        line["frames"]["face_score"] = [[score, None, score / 2] for score in scores]
    write_run(tmp_path, example_metrics(), validation, clips=True)
    text = visible(page(tmp_path))
    # Sample 19, before and after: three frames, the second without a face.
    assert f"0 1 2 step 0 0.61 {DASH} 0.30 step 40 0.60 {DASH} 0.30 truth" in text


def test_all_starts_are_in_a_table_that_sorts(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), clips=True)
    table = page(tmp_path).partition("All samples")[2].partition("</table>")[0]
    assert 'class="sortable"' in table
    headings = re.findall(r"<th [^>]*><button[^>]*>([^<]*)", table)
    compared = ["Face score", "Change", "Judge: face dlib", "Change"]
    assert headings == ["Sample", "Prompt", *compared, "PSNR to ground truth, dB"]
    rows = [re.findall(r"<td [^>]*>([^<]*)", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == [str(start) for start in range(20)]
    assert rows[0] == ["0", "a person 0 nods", "0.640", "+0.090", "0.724", "+0.024", "21.31"]
    keys = re.findall(r'data-sort="([^"]*)"', table.split("<tr>")[-1])
    assert float(keys[2]) == pytest.approx(0.09 - 0.0049 * 19)


def test_settings_that_were_not_changed_are_folded(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation())
    shown, _, folded = page(tmp_path).partition("<details>")
    assert "lora.rank" in shown and "lora.rank" not in folded
    assert "train.learning_rate" in folded and "train.learning_rate" not in shown


def test_a_run_of_before_these_facts_has_a_page(tmp_path: Path) -> None:
    """Write stages with one backend and one time, and neither sessions nor changed settings, like older runs."""
    metrics = example_metrics()
    for row in metrics:
        for entry in row["stages"].values():
            del entry["backends"]
        del row["peak_memory_gb"]
    write_run(tmp_path, metrics, example_validation())
    facts = {name: FACTS[name] for name in ("rewards", "judges", "about", "versions")}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    text = visible(page(tmp_path))
    assert f"vae_decoder_live live onnxruntime, torch 40 of 40 {DASH} {DASH} 310" in text
    assert "train.learning_rate 0.003" in text and "Peak memory" not in text
    assert "The first step, which loads engines, is left out: 70.0 s." in text


def test_a_run_that_went_wrong_is_told_as_it_is(tmp_path: Path) -> None:
    validation = example_validation(after=0.5, judge=-0.03)
    validation[1] |= {"psnr": 19.0, "detection_rate": 0.5}
    validation[1]["starts"]["face_score"] = [0.0] * 17 + [1.0] * 3
    write_run(tmp_path, example_metrics(), validation, {"step_ms": {"cached": 600.0, "torch": 561.2}})
    html = page(tmp_path)
    text = visible(html)
    assert "0.579 at step 0, 0.500 now; it went up in 3 of 20" in text
    assert f"0.94 {TIMES} the speed" in text
    assert f"Judge_face_dlib falls since step 40 ({MINUS}0.0300 ± 0.0014, 20 samples), and no reward rises" in text
    assert html.count('class="lead worse"') == 1
    # Only face score, judge and time of a step have a better direction; other changes have no colour.
    assert html.count('class="change worse"') == 3


def test_a_hacked_reward_is_named_at_the_top(tmp_path: Path) -> None:
    validation = example_validation(judge=-0.03, looks=5)
    validation[-1]["verdict"] = {"stops": True}
    write_run(tmp_path, example_metrics(), validation)
    text = visible(page(tmp_path))
    verdict = (
        "The reward rises while a judge falls, reward hacking? face_score rises (+0.0435 ± 0.0065, 20 samples), "
        f"judge_face_dlib falls since step 10 ({MINUS}0.0300 ± 0.0014, 20 samples). The run was ended at step 40, "
        "after 4 validations in a row at which a judge fell (train.stop_when_judge_falls)."
    )
    assert text.index(verdict) < text.index("40 steps, 1 of them skipped")


def test_names_of_any_reward_are_told(tmp_path: Path) -> None:
    """Replace the names of the reward: the page does not depend on them."""
    validation = json.loads(json.dumps(example_validation()).replace("face", "tail").replace("detection", "wagging"))
    metrics = json.loads(json.dumps(example_metrics()).replace("face", "tail").replace("detection", "wagging"))
    write_run(tmp_path, metrics, validation)
    text = visible(page(tmp_path))
    for words in ("Tail score 0.579 → 0.664", "Judge: tail dlib", "Tail score while training", "Wagging rate 0.983"):
        assert words in text
    assert "face" not in text.replace("The mean cosine of faces", "").replace("face_identity", "")


@pytest.mark.parametrize("validation", [[], example_validation()[:1]], ids=["none", "first"])
def test_a_run_at_work_has_a_page(tmp_path: Path, validation: list[dict[str, Any]]) -> None:
    write_run(tmp_path, example_metrics()[:3], validation)
    text = visible(page(tmp_path))
    assert "3 steps." in text
    # The time without the first step.
    assert "One training step 0.40 s" in text
    assert "improved" not in text and "Rewards and judges" not in text


def test_missing_values_leave_a_page(tmp_path: Path) -> None:
    validation = [{"step": 0, "face_score": None}, {"step": 1, "face_score": None, "starts": {"face_score": [None]}}]
    write_run(tmp_path, [{"step": 1, "loss": None}], validation, {})
    assert "nan" not in visible(page(tmp_path)).lower().split()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a run folder \(no metrics\.jsonl\)"):
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


@needs_chromium
def test_one_scrubber_moves_all_clips_of_a_start(tmp_path: Path) -> None:
    write_run(tmp_path, example_metrics(), example_validation(), clips=True)
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page(tmp_path))
    script = """<script>
      const row = document.querySelector(".comparison");
      const places = () => [...row.querySelectorAll("video")].map((clip) => clip.currentTime.toFixed(4)).join();
      const scrubber = row.querySelector("input");
      setTimeout(() => {
        const seen = [`last ${places()}`];
        scrubber.value = 1;
        scrubber.dispatchEvent(new Event("input"));
        seen.push(`${row.querySelector("output").textContent} ${places()}`);
        row.querySelector(".play").click();
        seen.push(row.querySelector(".play").textContent);
        row.querySelector(".enlarge").click();
        seen.push(row.querySelector(".player.large") ? "large" : "small");
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
        seen.push(row.querySelector(".player.large") ? "large" : "small");
        document.title = seen.join(" | ");
      }, 1000);
    </script></body>"""
    path = tmp_path / "opened.html"
    path.write_text(html.replace("</body>", script), encoding="utf-8")
    dom, _ = render(path, tmp_path / "profile")
    title = re.search(r"<title>last (.*?) \| 1 (.*?) \| Pause \| large \| small</title>", dom)
    assert title is not None
    # Three frames at 16 per second; each is shown at its middle.
    for places, frame in ((title[1], 2), (title[2], 1)):
        assert [float(place) for place in places.split(",")] == pytest.approx([(frame + 0.5) / 16] * 3, abs=2e-3)


@needs_chromium
def test_a_printed_page_is_small(tmp_path: Path) -> None:
    """Store pictures as JPEG in the PDF; decoded, they would take 10 MB."""
    write_run(tmp_path, example_metrics(), example_validation(), TIMING, clips=True)
    texture = torch.nn.functional.interpolate(torch.rand(9, 3, 48, 48), size=(96, 96), mode="bilinear")
    for clip in (tmp_path / "validation").glob("*/*.mp4"):
        write_video(clip, texture, fps=8)
    size = len(printed(write_report(tmp_path), tmp_path / "profile"))
    assert 100_000 < size < 3_000_000
