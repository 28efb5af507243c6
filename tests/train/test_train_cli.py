"""`frostline train` as a user runs it: a whole run, stopped and taken up again, and what is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from frostline.cli import app, main
from frostline.demo.run import DemoSettings, demo_settings
from frostline.models import loading
from frostline.models.loading import load_components
from frostline.models.tiny.clips import held_out_clips
from frostline.train.configfile import load_run_settings
from frostline.video import read_video, write_video

QUICK = """
model: tiny
device: cpu
num_inference_steps: 3
mid_timestep: 1
final_timestep: 2
noise_seed: null
lora: {rank: 4}
plan: {backend: torch}
reward: {type: "frostline.train.sharpness:SharpnessReward", baseline: 0, scale: 1}
data: {source: data, num_frames: 5}
validation: {source: data, num_frames: 5, steps: 2, num_videos: 2}
train: {learning_rate: 1.0e-3, max_train_steps: 4, per_device_train_batch_size: 2, checkpointing_steps: 2}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a configuration file."""
    folder = tmp_path_factory.mktemp("workplace")
    clips = held_out_clips(3, seed=2, num_frames=5, size=32)
    with (folder / "config.yaml").open("w") as file:
        file.write(QUICK)
    rows = []
    for index, (video, prompt) in enumerate(zip(clips.video, clips.prompts, strict=True)):
        write_video(folder / "data" / f"{index}.mp4", video, fps=8, lossless=True)
        rows.append({"video": f"{index}.mp4", "prompt": prompt})
    with (folder / "data" / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "frostline", "train", *arguments]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_is_stopped_and_taken_up_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = workplace / "run" / "metrics.jsonl"
    arguments = command("config.yaml", "output_dir=run", "train.max_train_steps=1000", "train.checkpointing_steps=500")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = len(lines(metrics))
        # A worker takes seconds to start; one run with one is enough.
        workers = f"data.num_workers={int(number == signal.SIGINT)}"
        with subprocess.Popen(
            [*arguments, workers, "--resume", "latest"],
            cwd=workplace,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while len(lines(metrics)) <= before and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        steps = [line["step"] for line in lines(metrics)]
        assert steps == list(range(1, len(steps) + 1))
        assert (workplace / "run" / f"checkpoint-{steps[-1]}" / "manifest.json").is_file()
    # A line may be broken where the terminal ends.
    said = " ".join(errors.split())
    assert "going on from" in said and "data.num_workers: 1 (was 0)" in said
    last = len(lines(metrics))
    monkeypatch.chdir(workplace)
    end = ["output_dir=run", f"train.max_train_steps={last + 2}", "--resume", "latest"]
    done = CliRunner().invoke(app, ["train", "config.yaml", *end])
    assert done.exit_code == 0, done.output
    run = workplace / "run"
    assert [line["step"] for line in lines(metrics)] == list(range(1, last + 3))
    validated = lines(run / "validation.jsonl")
    assert {"psnr", "sharpness", "starts"} <= validated[-1].keys()
    shown = run / "validation" / f"step-{validated[-1]['step']:06d}"
    assert sorted(path.name for path in shown.iterdir()) == ["0.mp4", "1.mp4", "contact_sheet.png"]
    assert len(read_video(run / "validation" / "truth" / "1.mp4")) == 5
    with shown.with_suffix(".csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    assert [pair["reference"] for pair in pairs] == ["truth/0.mp4", "truth/1.mp4"]
    PeftModel.from_pretrained(load_components("tiny").denoiser, str(run / "adapter"))
    page = (run / "report.html").read_text()
    assert "Held-out starts" in page
    assert "denoise_tail" in page
    (run / "report.html").unlink()
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").read_text() == page


def _break_a_video(folder: Path) -> None:
    (folder / "bad").mkdir()
    (folder / "bad" / "broken.mp4").write_text("no video")
    (folder / "bad" / "gone.txt").write_text("a caption without a video")
    (folder / "bad" / "metadata.jsonl").write_text(
        '{"video": "broken.mp4", "prompt": "p"}\n{"video": "missing.mp4", "prompt": "p"}\n'
    )


def _occupy(folder: Path) -> None:
    (folder / "occupied").mkdir()
    (folder / "occupied" / "metrics.jsonl").write_text("{}\n")


def _nothing(folder: Path) -> None:
    pass


def _quantise(folder: Path) -> None:
    """A checkpoint as bitsandbytes stores it: two weights in a byte."""
    shutil.copytree(Path(loading.__file__).parent / "tiny" / "weights" / "tiny", folder / "quantised")
    path = folder / "quantised" / "diffusion_pytorch_model.safetensors"
    name = "blocks.0.ffn.0.weight"
    packed = {name: torch.zeros(32768, 1, dtype=torch.uint8), f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8)}
    save_file({**load_file(path), **packed}, path)


CONVOLUTION = "'patch_embedding' names patch_embedding, a Conv3d: only linear layers can have a LoRA"

REFUSED: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no file": (_nothing, ["gone.yaml"], 2, "gone.yaml: no such configuration file"),
    "nothing": (_nothing, [], 2, "a configuration file is needed"),
    "unknown key": (_nothing, ["CONFIG", "train.learning_rat=1"], 2, "is learning_rate meant?"),
    "no data": (_nothing, ["CONFIG", "data.source=null"], 2, "data.source: is needed"),
    "data is gone": (_nothing, ["CONFIG", "data.source=gone"], 1, "gone: no such file or folder"),
    "bad rows": (_break_a_video, ["CONFIG", "data.source=bad"], 1, "2 of 2 rows cannot be trained on"),
    "bad rows named": (_break_a_video, ["CONFIG", "data.source=bad"], 1, "row 2 (sample missing.mp4)"),
    "no row left": (_break_a_video, ["CONFIG", "data.source=bad", "data.bad_rows=skip"], 1, "2 of 2 rows"),
    "dry run": (_break_a_video, ["CONFIG", "data.source=bad", "--dry-run"], 1, "missing.mp4"),
    "bad validation": (_break_a_video, ["CONFIG", "validation.source=bad"], 1, "validation: "),
    "no tracker": (_nothing, ["CONFIG", "train.report_to=trackio"], 2, "trackio is not installed: pip install trackio"),
    "no gpu": (_nothing, ["CONFIG", "device=cuda"], 2, "torch finds no GPU here"),
    "no model": (_nothing, ["CONFIG", "model=nowhere"], 2, "nowhere"),
    "no reward": (_nothing, ["CONFIG", "reward.type=no.module:Class"], 2, "no.module cannot be imported"),
    "no backend": (_nothing, ["CONFIG", "plan.backend=tensorflow"], 2, "tensorflow"),
    "no stage": (_nothing, ["CONFIG", "plan.stages={vae: torch}"], 2, "there is no stage 'vae'"),
    "no shapes": (_nothing, ["CONFIG", "plan.min_shapes=vide:1x5x3x64x64"], 2, "unknown tensor 'vide'"),
    "no engine": (_nothing, ["CONFIG", "plan.backend=onnxruntime", "plan.strict=true"], 1, "no engine of"),
    "no checkpoint": (_nothing, ["CONFIG", "--resume", "gone"], 1, "gone: no such folder to resume from"),
    "no embedder": (
        _nothing,
        ["CONFIG", "reward.type=face_identity", "reward.embedder=sfase"],
        2,
        "unknown face embedder 'sfase'",
    ),
    "infinite": (_nothing, ["CONFIG", "train.learning_rate=inf"], 2, "train.learning_rate"),
    "dry run, no stage": (_nothing, ["CONFIG", "--dry-run", "plan.stages={vae: torch}"], 1, "there is no stage 'vae'"),
    "dry run, no backend": (_nothing, ["CONFIG", "--dry-run", "plan.backend=tensorflow"], 1, "tensorflow"),
    "dry run, no reward": (_nothing, ["CONFIG", "--dry-run", "reward.type=no.module:Class"], 1, "cannot be imported"),
    "dry run, another run": (_occupy, ["CONFIG", "--dry-run", "output_dir=occupied"], 1, "holds a run already"),
    "another run": (_occupy, ["CONFIG", "output_dir=occupied"], 2, "occupied holds a run already"),
    "a convolution": (_nothing, ["CONFIG", "lora.target_modules=[patch_embedding]"], 2, CONVOLUTION),
    "dry run, a convolution": (
        _nothing,
        ["CONFIG", "--dry-run", "lora.target_modules=[patch_embedding]"],
        1,
        CONVOLUTION,
    ),
    "dry run, 4 bits": (_quantise, ["CONFIG", "--dry-run", "model=quantised"], 1, "quantised as NF4 (bitsandbytes)"),
    "no report": (_nothing, ["report", "."], 1, "holds no run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_words(
    name: str,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare, arguments, code, said = REFUSED[name]
    prepare(tmp_path)
    (tmp_path / "data").symlink_to(workplace / "data")
    (tmp_path / "config.yaml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("CONFIG", "config.yaml") for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["frostline", *([] if arguments[:1] == ["report"] else ["train"]), *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as exit_:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    output = " ".join(" ".join(capsys.readouterr()).split())
    assert exit_.value.code == code, output
    assert said in output
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


def test_a_dry_run_says_what_would_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    result = CliRunner().invoke(app, ["train", "config.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in ("rollout head: frozen", "denoise tail: gradient", "data: 3 of 3 rows", "this run could begin"):
        assert words in result.output
    printed = CliRunner().invoke(app, ["train", "config.yaml", "lora.rank=5", "--print-config"])
    assert "rank: 5" in printed.output


def test_the_reference_is_planned_without_its_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """14 B parameters, twice, on eight cards of 80 GB: what runs at each step, and the memory of each stage."""
    monkeypatch.chdir(workplace)
    reference = str(Path(__file__).parents[2] / "examples" / "Wan2.2-I2V-A14B.yaml")
    machine = ["memory.num_processes=8", "memory.sharding=fsdp", "memory.device_gb=80"]
    sources = ["data.source=data", "validation.source=data"]
    result = CliRunner().invoke(app, ["train", reference, "--dry-run", *machine, *sources])
    assert result.exit_code == 0, result.output
    assert result.output.count("rollout head: frozen; high-noise expert") == 3
    assert result.output.count("rollout head: frozen; low-noise expert") == 1
    for words in (
        "denoiser_high_noise",
        "text_encoder",
        "8 processes (fsdp): peak",
        "which has 80.00: fits",
        "checkpointing: full",
    ):
        assert words in result.output


def test_the_demo_trains_with_the_tiny_example() -> None:
    example = load_run_settings(Path(__file__).parents[2] / "examples" / "tiny.yaml")
    demo = demo_settings(Path("runs/demo"), Path("engines"), DemoSettings())
    for name in ("lora", "kl_weight", "noise_seed", "reward", "num_inference_steps"):
        assert getattr(demo, name) == getattr(example, name), name
    for name in ("learning_rate", "max_train_steps", "per_device_train_batch_size", "seed", "max_grad_norm"):
        assert getattr(demo.train, name) == getattr(example.train, name), name
    assert demo.data.num_frames == example.data.num_frames
