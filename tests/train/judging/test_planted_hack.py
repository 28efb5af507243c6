"""A run of the real trainer that hacks its reward, which the judge detects; training does not use the judge.

The reward is brightness, without a KL term and with a learning rate that is far too high. It rises, because frames
saturate to white; the judge measures sharpness, which is lost.
"""

from pathlib import Path
from typing import Any

import pytest
from browser import visible

from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.train.launch import run_training
from frostline.train.loop.run_dir import read_lines
from frostline.train.loop.trainer import TrainOutcome
from frostline.train.settings import RunSettings
from frostline.video import write_video

Run = tuple[Path, TrainOutcome]
BASE: dict[str, Any] = {
    "model": "tiny",
    "device": "cpu",
    "num_inference_steps": 3,
    "grad_start_step": 1,
    "grad_end_step": 2,
    # Use fresh noise in each step, which would differ if validation changed the state of the random generators.
    "noise_seed": None,
    "kl_weight": 0.0,
    "lora": {"rank": 4},
    "rewards": [{"type": "own_rewards:Brightness", "weight": 1.0}],
    "plan": {"backend": "torch"},
}
JUDGES = [{"type": "sharpness"}, {"type": "own_rewards:Restless"}]
TRAIN = {"learning_rate": 3e-2, "max_train_steps": 3, "checkpointing_steps": 1, "seed": 0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    held_out = held_out_clips(3, seed=2, num_frames=5, size=32)
    for index, (video, prompt) in enumerate(zip(held_out.video, held_out.prompts, strict=True)):
        write_video(folder / f"{index}.mp4", video, lossless=True)
        (folder / f"{index}.txt").write_text(prompt)
    return folder


def run(clips: Path, out: Path, judges: list[dict[str, Any]], resume: str | None = None, **train: Any) -> TrainOutcome:
    data = {"source": clips, "num_frames": 5}
    validation = {**data, "steps": 1, "num_videos": 3, "batch_size": 3, "judges": judges}
    values = {"output_dir": out, "data": data, "validation": validation, "train": {**TRAIN, **train}}
    return run_training(RunSettings.parse({**BASE, **values}), resume, Progress(quiet=True))


@pytest.fixture(scope="module")
def hacked(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("hacked") / "run"
    return out, run(clips, out, JUDGES)


@pytest.fixture(scope="module")
def stopped(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("stopped") / "run"
    return out, run(clips, out, JUDGES, stop_when_judge_falls=2)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_sentence_names_it(hacked: Run) -> None:
    out, outcome = hacked
    lines = read_lines(out / "validation.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["judges"] == ["judge_sharpness", "judge_restless"]
    assert "verdict" not in lines[0]
    last = lines[-1]["verdict"]
    assert (last["kind"], last["says"]) == ("hacking", outcome.verdict)
    assert outcome.verdict.startswith("the reward rises while a judge falls, reward hacking? brightness rises (+")
    assert "judge_sharpness falls since step 1 (" in outcome.verdict
    assert (outcome.step, outcome.stopped_by_judge) == (3, False)
    page = visible((out / "report.html").read_text())
    assert f"T{outcome.verdict[1:]}" in page
    assert page.index("reward hacking?") < page.index("Rewards and judges") < page.index("Judge: sharpness: change")
    assert "The run was ended" not in page


def test_what_judges_measure_goes_where_all_measures_go(hacked: Run) -> None:
    out, _ = hacked
    line = read_lines(out / "validation.jsonl")[-1]
    assert {"judge_sharpness", "judge_sharpness_sharpness_ratio"} <= line.keys() & line["starts"].keys()
    assert {"brightness", "judge_sharpness", "judge_sharpness_sharpness_ratio", "psnr"} <= line["paired"].keys()
    header = (out / "validation" / "step-000003.csv").read_text().splitlines()[0]
    assert header.startswith("video,reference,prompt,psnr,brightness,judge_sharpness,judge_sharpness_sharpness_ratio")
    # The metrics of training steps do not contain them.
    assert not any("sharpness" in name for row in read_lines(out / "metrics.jsonl") for name in row)


def test_it_is_ended_where_the_judge_keeps_falling(hacked: Run, stopped: Run) -> None:
    out, outcome = stopped
    assert (outcome.step, outcome.stopped_by, outcome.stopped_by_judge) == (2, None, True)
    assert adapter(out / "adapter") == adapter(out / "checkpoint-2") == adapter(hacked[0] / "checkpoint-2")
    page = visible((out / "report.html").read_text())
    assert "The run was ended at step 2, after 2 validations in a row at which a judge fell" in page


def test_who_resumes_it_comes_to_the_next_validation(clips: Path, hacked: Run, stopped: Run) -> None:
    out, _ = stopped
    outcome = run(clips, out, JUDGES, "latest", stop_when_judge_falls=2, max_train_steps=9)
    assert (outcome.step, outcome.stopped_by_judge) == (3, True)
    assert adapter(out / "adapter") == adapter(hacked[0] / "checkpoint-3")
    lines = [read_lines(folder / "validation.jsonl") for folder in (out, hacked[0])]
    for one, other in zip(*lines, strict=True):
        assert {name: one["starts"][name] for name in ("brightness", "judge_sharpness", "psnr")} == {
            name: other["starts"][name] for name in ("brightness", "judge_sharpness", "psnr")
        }
    assert [line["verdict"]["falling_in_row"] for line in lines[0][1:]] == [1, 2, 3]


def test_training_never_sees_them(clips: Path, hacked: Run, tmp_path: Path) -> None:
    """Judges, and the random numbers that they draw, do not change a bit of the adapter."""
    run(clips, tmp_path / "run", [], max_train_steps=2)
    assert adapter(tmp_path / "run" / "checkpoint-2") == adapter(hacked[0] / "checkpoint-2")
    line = read_lines(tmp_path / "run" / "validation.jsonl")[-1]
    assert line["verdict"]["kind"] == "unjudged"
    # A judge that is added later has nothing to compare with in its first validation.
    outcome = run(clips, tmp_path / "run", JUDGES, "latest")
    assert "judge_sharpness is new" in outcome.verdict
    assert adapter(tmp_path / "run" / "adapter") == adapter(hacked[0] / "adapter")
