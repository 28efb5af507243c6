"""`frostline train` from the command line: a whole run, stopped and resumed, and settings that are refused."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import content
from forked import Python
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import frostline
from frostline.cli import app, main
from frostline.demo.run import DemoSettings, demo_settings
from frostline.errors import ConfigError
from frostline.models.checkpoints import loading
from frostline.models.checkpoints.loading import load_components
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.recipes import training_config
from frostline.train.config_file import load_run_settings
from frostline.train.launch import run_training
from frostline.train.loop.optimizer_step import optimizer_step
from frostline.video import read_video, write_video

FACES_TWICE = "rewards=[{type: face_identity}, {type: face_identity, detector: yunet}]"
QUICK = """
model: tiny
device: cpu
num_inference_steps: 3
grad_start_step: 1
grad_end_step: 2
noise_seed: null
lora: {rank: 4}
plan: {backend: torch}
rewards: [{type: sharpness}]
data: {source: data, num_frames: 5}
validation: {source: data, num_frames: 5, steps: 2, num_videos: 2}
train: {learning_rate: 1.0e-3, max_train_steps: 4, per_device_train_batch_size: 2, checkpointing_steps: 2}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with data and a configuration file."""
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


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_is_stopped_and_taken_up_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = workplace / "run" / "metrics.jsonl"
    settings = ["output_dir=run", "train.max_train_steps=1000", "train.checkpointing_steps=500"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = len(lines(metrics))
        # A worker takes seconds to start, so only one of the runs uses one.
        workers = f"data.num_workers={int(number == signal.SIGINT)}"
        arguments = ["train", "config.yaml", *settings, workers, "--resume", "latest"]
        process = Python("-m", "frostline", *arguments, cwd=workplace)
        while len(lines(metrics)) <= before and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, number)
        ended = process.wait(timeout=120)
        _, errors = process.said()
        assert ended == code, errors
        assert "Traceback" not in errors
        steps = [line["step"] for line in lines(metrics)]
        assert steps == list(range(1, len(steps) + 1))
        assert (workplace / "run" / f"checkpoint-{steps[-1]}" / "manifest.json").is_file()
    # A line may be wrapped at the width of the terminal.
    said = " ".join(errors.split())
    assert "resuming from" in said and "data.num_workers: 1 (was 0)" in said
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
    assert "Validation samples" in page
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
    (folder / "occupied" / "run.json").write_text('{"frostline": "0"}')
    (folder / "occupied" / "metrics.jsonl").write_text("{}\n")


def _fill(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "config.yaml").write_text("mine: true")


def _misname(folder: Path) -> None:
    """Write a model with a renamed tensor, and one without a tensor that determines its sizes."""
    weights = Path(frostline.__file__).parent / "models/tiny/weights/tiny"
    for name, file, tensor in (
        ("misnamed", "diffusion_pytorch_model.safetensors", "time_embedding.2.weight"),
        ("unsized", "models_t5_umt5-xxl-enc.safetensors", "token_embedding.weight"),
    ):
        shutil.copytree(weights, folder / name)
        tensors = load_file(folder / name / file)
        tensors[tensor + "s"] = tensors.pop(tensor)
        save_file(tensors, folder / name / file)


def _nothing(folder: Path) -> None:
    pass


def _quantise(folder: Path) -> None:
    """Write a checkpoint like bitsandbytes: two weights per byte."""
    shutil.copytree(Path(loading.__file__).parents[1] / "tiny" / "weights" / "tiny", folder / "quantised")
    path = folder / "quantised" / "diffusion_pytorch_model.safetensors"
    name = "blocks.0.ffn.0.weight"
    packed = {name: torch.zeros(32768, 1, dtype=torch.uint8), f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8)}
    save_file({**load_file(path), **packed}, path)


CONVOLUTION = "'patch_embedding' matches patch_embedding, a Conv3d: only linear layers can have a LoRA"

REFUSED: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no file": (_nothing, ["gone.yaml"], 2, "gone.yaml: no such configuration file"),
    "nothing": (_nothing, [], 2, "no configuration file"),
    "unknown key": (_nothing, ["CONFIG", "train.learning_rat=1"], 2, "did you mean learning_rate?"),
    "no data": (_nothing, ["CONFIG", "data.source=null"], 2, "data.source: required"),
    "data is gone": (_nothing, ["CONFIG", "data.source=gone"], 1, "gone: no such file or folder"),
    "bad rows": (_break_a_video, ["CONFIG", "data.source=bad"], 1, "2 of 2 rows are invalid"),
    "bad rows named": (_break_a_video, ["CONFIG", "data.source=bad"], 1, "row 2 (sample missing.mp4)"),
    "no row left": (_break_a_video, ["CONFIG", "data.source=bad", "data.bad_rows=skip"], 1, "2 of 2 rows"),
    "dry run": (_break_a_video, ["CONFIG", "data.source=bad", "--dry-run"], 1, "missing.mp4"),
    "bad validation": (_break_a_video, ["CONFIG", "validation.source=bad"], 1, "validation: "),
    "no tracker": (_nothing, ["CONFIG", "train.report_to=trackio"], 2, "trackio is not installed: pip install trackio"),
    "no gpu": (_nothing, ["CONFIG", "device=cuda"], 2, "torch finds no GPU"),
    "no model": (_nothing, ["CONFIG", "model=nowhere"], 2, "nowhere"),
    "no reward": (_nothing, ["CONFIG", "rewards.0.type=no.module:Class"], 2, "no.module cannot be imported"),
    "no backend": (_nothing, ["CONFIG", "plan.backend=tensorflow"], 2, "tensorflow"),
    "no stage": (_nothing, ["CONFIG", "plan.stages={vae: torch}"], 2, "there is no stage 'vae'"),
    "no shapes": (_nothing, ["CONFIG", "plan.min_shapes=vide:1x5x3x64x64"], 2, "unknown tensor 'vide'"),
    "no engine": (_nothing, ["CONFIG", "plan.backend=onnxruntime", "plan.strict=true"], 1, "no engine of"),
    "no checkpoint": (_nothing, ["CONFIG", "--resume", "gone"], 1, "gone: no such folder to resume from"),
    "no embedder": (
        _nothing,
        ["CONFIG", "rewards.0.type=face_identity", "rewards.0.embedder=sfase"],
        2,
        "unknown face embedder 'sfase'",
    ),
    "faces twice": (_nothing, ["CONFIG", FACES_TWICE], 2, "rewards: two entries have the name 'face_score'"),
    "dry run, faces twice": (_nothing, ["CONFIG", "--dry-run", FACES_TWICE], 1, "rewards: two entries have the name"),
    "infinite": (_nothing, ["CONFIG", "train.learning_rate=inf"], 2, "train.learning_rate"),
    "dry run, no stage": (_nothing, ["CONFIG", "--dry-run", "plan.stages={vae: torch}"], 1, "there is no stage 'vae'"),
    "dry run, no backend": (_nothing, ["CONFIG", "--dry-run", "plan.backend=tensorflow"], 1, "tensorflow"),
    "dry run, no reward": (
        _nothing,
        ["CONFIG", "--dry-run", "rewards.0.type=no.module:Class"],
        1,
        "cannot be imported",
    ),
    "dry run, no class": (
        _nothing,
        ["CONFIG", "--dry-run", "rewards.0.type=frostline.rewards.sharpness:Shrpness"],
        1,
        "frostline.rewards.sharpness has no class 'Shrpness'",
    ),
    "dry run, another run": (_occupy, ["CONFIG", "--dry-run", "output_dir=occupied"], 1, "already contains a run"),
    "dry run, no run": (_fill, ["CONFIG", "--dry-run", "output_dir=mine"], 1, "but no run of frostline"),
    "dry run, no run to overwrite": (
        _fill,
        ["CONFIG", "--dry-run", "output_dir=mine", "overwrite_output_dir=true"],
        1,
        "mine already contains config.yaml, but no run of frostline",
    ),
    "dry run, no place": (_nothing, ["CONFIG", "--dry-run", "output_dir=config.yaml/run"], 1, "cannot be written to"),
    "dry run, no checkpoint": (_nothing, ["CONFIG", "--dry-run", "--resume", "gone"], 1, "gone: no such folder"),
    "dry run, no gpu": (_nothing, ["CONFIG", "--dry-run", "device=cuda"], 1, "torch finds no GPU"),
    "dry run, misnamed": (
        _misname,
        ["CONFIG", "--dry-run", "model=misnamed"],
        1,
        "time_embedding.2.weight is missing, and 1 more tensors do not match",
    ),
    "dry run, unsized": (_misname, ["CONFIG", "--dry-run", "model=unsized"], 1, "cannot be loaded"),
    "misnamed": (_misname, ["CONFIG", "model=misnamed"], 2, "time_embedding.2.weight is missing"),
    "unsized": (_misname, ["CONFIG", "model=unsized"], 2, "cannot be loaded"),
    "no run": (_fill, ["CONFIG", "output_dir=mine"], 2, "but no run of frostline"),
    "no run to begin anew": (
        _fill,
        ["CONFIG", "output_dir=mine", "--resume", "latest"],
        2,
        "but no run of frostline",
    ),
    "no place": (_nothing, ["CONFIG", "output_dir=config.yaml/run"], 1, "cannot be written to: Not a directory"),
    "dry run, no memory": (
        _nothing,
        ["CONFIG", "--dry-run", "memory.device_gb=0.024", "precompute=never"],
        1,
        "GB per device are needed, but only 0.02 GB are available; it fits with precompute=always: 0.02 GB",
    ),
    "dry run, far too little memory": (
        _nothing,
        ["CONFIG", "--dry-run", "memory.device_gb=0.001"],
        1,
        "GB are needed for videos of any size",
    ),
    "another run": (_occupy, ["CONFIG", "output_dir=occupied"], 2, "occupied already contains a run"),
    "a convolution": (_nothing, ["CONFIG", "lora.target_modules=[patch_embedding]"], 2, CONVOLUTION),
    "dry run, a convolution": (
        _nothing,
        ["CONFIG", "--dry-run", "lora.target_modules=[patch_embedding]"],
        1,
        CONVOLUTION,
    ),
    "dry run, 4 bits": (_quantise, ["CONFIG", "--dry-run", "model=quantised"], 1, "quantised as NF4 (bitsandbytes)"),
    "no report": (_nothing, ["report", "."], 1, "not a run folder (no metrics.jsonl)"),
}


@pytest.fixture
def frostline_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`frostline_in(folder, "train", …)`: run a command; return the exit code, and its output on one line."""

    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["frostline", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as exit_:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, " ".join(" ".join(capsys.readouterr()).split())

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_words(
    name: str, workplace: Path, tmp_path: Path, frostline_in: Callable[..., tuple[int, str]]
) -> None:
    prepare, arguments, code, said = REFUSED[name]
    prepare(tmp_path)
    (tmp_path / "data").symlink_to(workplace / "data")
    (tmp_path / "config.yaml").write_text(QUICK)
    arguments = [argument.replace("CONFIG", "config.yaml") for argument in arguments]
    command = [] if arguments[:1] == ["report"] else ["train"]
    found, output = frostline_in(tmp_path, *command, *arguments)
    assert found == code, output
    assert said in output
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


def test_a_dry_run_imports_no_reward(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_reward.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a')\nclass Reward: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(workplace)
    for flag, words in (("--dry-run", "the run can begin"), ("--print-config", "its_reward:Reward")):
        result = CliRunner().invoke(app, ["train", "config.yaml", flag, "rewards.0.type=its_reward:Reward"])
        assert result.exit_code == 0, result.output
        assert words in result.output
    assert not (tmp_path / "imported").exists()


def test_a_dry_run_leaves_no_trace(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(workplace / "data")
    (tmp_path / "config.yaml").write_text(QUICK)
    _occupy(tmp_path)
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Once for a run that can be overwritten, and once for one that was killed before its first checkpoint.
    for arguments in (["overwrite_output_dir=true"], ["--resume", "latest"]):
        result = CliRunner().invoke(app, ["train", "config.yaml", "--dry-run", "output_dir=occupied", *arguments])
        assert result.exit_code == 0, result.output
        assert "the run can begin" in result.output
    assert content(tmp_path) == before


class _Killed(BaseException):
    """An exception that ends a run like a kill: the run cannot catch it."""


@pytest.fixture(scope="module")
def killed(workplace: Path) -> Path:
    """Return the folder of a run that was killed in its third step, after two checkpoints."""

    def die_after_two(training: Any, batches: Any) -> Any:
        if training.step == 2:
            raise _Killed
        return optimizer_step(training, batches)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(workplace):
        patch.setattr("frostline.train.loop.trainer.optimizer_step", die_after_two)
        settings = load_run_settings(Path("config.yaml"), ["output_dir=killed", "train.checkpointing_steps=1"])
        with pytest.raises(_Killed):
            run_training(settings, None, Progress(quiet=True))
        # What resuming would shorten and delete.
        shutil.copytree("killed/checkpoint-2", "killed/.checkpoint-3.01234567.partial")
        with Path("killed/metrics.jsonl").open("a") as file:
            file.write('{"step": 3}\n{"st')
    return workplace / "killed"


def _damage(folder: Path) -> None:
    for path in folder.glob("killed/checkpoint-*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def _alias_its_settings(folder: Path) -> None:
    """Write settings that contain themselves into a checkpoint whose manifest is valid."""
    checkpoint = folder / "killed" / "checkpoint-2"
    config = checkpoint / "config.yaml"
    config.write_text("lora: &a {rank: *a}")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(config.read_bytes()).hexdigest()
    manifest["files"]["config.yaml"] = {"bytes": config.stat().st_size, "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


NOT_RESUMED: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "rank": (_nothing, ["lora.rank=8"], 2, "lora.rank: the adapter in killed/checkpoint-2 has rank 4, not 8"),
    "scale": (_nothing, ["lora.alpha=8"], 2, "has a scale (alpha / rank) of 1, not 2"),
    "layers": (_nothing, ["lora.target_modules=[q]"], 2, "is on other layers: blocks.0.cross_attn.k matches none"),
    "more layers": (
        _nothing,
        ["lora.target_modules=[q,k,v,o,ffn.0,ffn.2,ffn.3]"],
        2,
        "'ffn.3' matches no module of the denoiser",
    ),
    "damaged": (_damage, [], 1, "none of the 2 checkpoints in killed is intact"),
    "settings": (
        _alias_its_settings,
        [],
        1,
        "config.yaml is not valid YAML: line 1, column 7: an alias refers to a node",
    ),
    "data": (_nothing, ["data.source=gone"], 1, "gone: no such file or folder"),
    "rows": (_break_a_video, ["data.source=bad"], 1, "2 of 2 rows are invalid"),
    "validation": (_nothing, ["validation.source=gone"], 1, "gone: no such file or folder"),
    "model": (_nothing, ["model=nowhere"], 2, "nowhere"),
    "reward": (_nothing, ["rewards.0.type=no.module:Class"], 2, "cannot be imported"),
    "tracker": (_nothing, ["train.report_to=trackio"], 2, "trackio is not installed"),
    "engine": (_nothing, ["plan.backend=onnxruntime", "plan.strict=true"], 1, "no engine of"),
}


@pytest.mark.parametrize("reason", NOT_RESUMED)
def test_a_refused_resume_leaves_the_run_as_it_was(
    reason: str, killed: Path, tmp_path: Path, frostline_in: Callable[..., tuple[int, str]]
) -> None:
    prepare, overrides, code, said = NOT_RESUMED[reason]
    for name in ("data", "config.yaml"):
        (tmp_path / name).symlink_to(killed.parent / name)
    shutil.copytree(killed, tmp_path / "killed")
    prepare(tmp_path)
    before = content(tmp_path / "killed")
    found, output = frostline_in(
        tmp_path, "train", "config.yaml", "output_dir=killed", "--resume", "latest", *overrides
    )
    assert found == code, output
    assert said in output
    assert content(tmp_path / "killed") == before


def test_a_run_killed_before_its_first_checkpoint_recovers_when_it_is_started_again(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(killed.parent / "data")
    (tmp_path / "config.yaml").write_text(QUICK)
    shutil.copytree(killed, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "config.yaml", "output_dir=run", "train.max_train_steps=1"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError) and "already contains a run (metrics.jsonl)" in str(done.exception)
    done = CliRunner().invoke(app, [*arguments, "--resume", "latest"])
    assert done.exit_code == 0, done.output
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert [line["step"] for line in lines(tmp_path / "run" / "validation.jsonl")] == [0, 1]
    assert list((tmp_path / "run").glob(".checkpoint-*")) == []


def test_a_dry_run_says_what_would_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    result = CliRunner().invoke(app, ["train", "config.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in ("rollout head: frozen", "denoise tail: with gradient", "data: 3 of 3 rows", "the run can begin"):
        assert words in result.output
    assert "fewer than" not in result.output
    result = CliRunner().invoke(app, ["train", "config.yaml", "--dry-run", "data.num_frames=9"], env={"COLUMNS": "200"})
    assert "data: 3 of 3 clips have fewer than 9 frames: their last frame is repeated" in result.output
    assert "memory of a step of 2x9x32x32" in result.output, (
        "the size must be that of the clips, not the largest allowed one"
    )
    printed = CliRunner().invoke(app, ["train", "config.yaml", "lora.rank=5", "--print-config"])
    assert "rank: 5" in printed.output


def test_a_run_chooses_what_to_recompute_by_the_sizes_of_its_clips(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(workplace)
    caplog.set_level("INFO", "frostline")
    once = ["train.max_train_steps=1", "validation.source=null", f"output_dir={tmp_path / 'run'}"]
    run_training(load_run_settings(Path("config.yaml"), once), None, Progress(quiet=True))
    assert "gradient checkpointing: GB needed by a step of 2x5x32x32" in caplog.text


def test_the_reference_is_planned_without_its_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan two experts of 14 B parameters on eight GPUs of 80 GB: the steps, and the memory of each stage."""
    monkeypatch.chdir(workplace)
    reference = str(training_config("Wan2.2-I2V-A14B"))
    machine = ["memory.num_processes=8", "memory.sharding=fsdp", "memory.device_gb=80", "precompute=never"]
    # Larger than the clips in the folder.
    sources = ["data.source=data", "validation.source=data", "data.height=480", "data.width=480"]
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
    example = load_run_settings(training_config("tiny"))
    demo = demo_settings(Path("runs/demo"), Path("engines"), DemoSettings())
    for name in ("lora", "kl_weight", "noise_seed", "rewards", "num_inference_steps"):
        assert getattr(demo, name) == getattr(example, name), name
    for name in ("learning_rate", "max_train_steps", "per_device_train_batch_size", "seed", "max_grad_norm"):
        assert getattr(demo.train, name) == getattr(example.train, name), name
    assert demo.data.num_frames == example.data.num_frames
