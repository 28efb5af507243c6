"""A run that starts from an existing adapter, with a new optimizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter, place
from safetensors.torch import load_file
from typer.testing import CliRunner

from frostline.cli import app
from frostline.models.lora import read_adapter, write_adapter
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.train.launch import run_training
from frostline.train.loop import trainer
from frostline.train.settings import RunSettings
from frostline.train.step.module import TrainingModule
from frostline.video import write_video

RANK, ALPHA = 4, 6.0
Made = tuple[TrainingModule, dict[str, torch.Tensor]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the working folder: data, an adapter as PEFT folder and as one file, and a configuration without it."""
    clips = held_out_clips(1, seed=2, num_frames=5, size=32)
    write_video(tmp_path / "data" / "0.mp4", clips.video[0], lossless=True)
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"video": "0.mp4", "prompt": clips.prompts[0]}))
    _, adapter = make_adapter(tmp_path / "peft", ALPHA, rank=RANK)
    write_adapter(adapter, "comfyui", tmp_path / "comfyui.safetensors")
    (tmp_path / "config.yaml").write_text(json.dumps(values()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(**changes: Any) -> dict[str, Any]:
    return {
        **{"model": "tiny", "device": "cpu", "output_dir": "run"},
        **{"num_inference_steps": 2, "grad_start_step": 1, "grad_end_step": 1},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "plan": {"backend": "torch"},
        "rewards": [{"type": "sharpness"}],
        "data": {"source": "data/metadata.jsonl", "num_frames": 5},
        "train": {"learning_rate": 1e-3, "max_train_steps": 2, "checkpointing_steps": 1},
        **changes,
    }


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Return a list that gets the module and the initial LoRA of each run."""
    found: list[Made] = []
    train = trainer.train

    def watch(module: TrainingModule, *arguments: Any) -> Any:
        found.append((module, {name: p.detach().clone() for name, p in module.trainable_parameters().items()}))
        return train(module, *arguments)

    monkeypatch.setattr("frostline.train.launch.train", watch)
    return found


@pytest.mark.parametrize("kind", ["peft", "comfyui"])
def test_step_0_is_the_model_of_the_adapter(kind: str, workplace: Path, begun: list[Made]) -> None:
    path = place(workplace, kind)
    result = CliRunner().invoke(app, ["train", "config.yaml", "--init-adapter", str(path)])
    assert result.exit_code == 0, result.output
    ((module, lora),) = begun
    wanted = load_file(workplace / "peft" / "adapter_model.safetensors")
    assert {f"base_model.model.{name.replace('.default.', '.')}" for name in lora} == wanted.keys()
    for name, matrix in lora.items():
        assert torch.equal(matrix, wanted[f"base_model.model.{name.replace('.default.', '.')}"])
    # The KL term of the first step is that of the adapter; for a new LoRA, it would be 0.
    first, _ = (json.loads(line) for line in (workplace / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["kl_loss"] > 1e-4
    trained = read_adapter(workplace / "run" / "adapter").uniform()
    assert (trained.rank, trained.alpha) == (RANK, ALPHA)
    assert any(not torch.equal(p, lora[name]) for name, p in module.trainable_parameters().items())


def test_each_of_two_experts_begins_with_its_own(
    workplace: Path, begun: list[Made], refused_usage: Callable[..., str]
) -> None:
    # The high-noise expert computes the first two of three steps.
    both = values(
        model="tiny-moe",
        lora={"rank": RANK, "alpha": ALPHA, "experts": "both"},
        **{"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2},
    )
    run_training(RunSettings.parse(both), None, Progress(quiet=True))
    again = {**both, "output_dir": "again", "init_adapter": "run/adapter"}
    run_training(RunSettings.parse(again), None, Progress(quiet=True))
    _, (_, lora) = begun
    wanted = {}
    for part in ("high_noise", "low_noise"):
        for name, matrix in load_file(f"run/adapter/{part}/adapter_model.safetensors").items():
            wanted[f"{part}.{name.removeprefix('base_model.model.').replace('.weight', '.default.weight')}"] = matrix
    assert lora.keys() == wanted.keys()
    assert all(torch.equal(matrix, wanted[name]) for name, matrix in lora.items())
    assert all(matrix.any() for matrix in lora.values()), "both were trained: B of a new LoRA is zero"
    first = json.loads((workplace / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_loss"] > 1e-8
    # As files, as `frostline adapter convert` writes them.
    for part in ("high_noise", "low_noise"):
        write_adapter(read_adapter(Path("run/adapter") / part), "comfyui", Path("files") / f"{part}.safetensors")
    files = {**both, "output_dir": "from_files", "init_adapter": "files"}
    run_training(RunSettings.parse(files), None, Progress(quiet=True))
    _, _, (_, from_files) = begun
    assert all(torch.equal(matrix, lora[name]) for name, matrix in from_files.items())
    # An adapter of only one expert is refused.
    shutil.rmtree("run/adapter/low_noise")
    (workplace / "both.yaml").write_text(json.dumps({**again, "output_dir": "third"}))
    said = refused_usage("train", "both.yaml")
    assert "run/adapter contains no adapter of the low-noise expert" in said


def test_resuming_does_not_read_it_again(workplace: Path, begun: list[Made]) -> None:
    settings = {"init_adapter": "peft"}
    run_training(RunSettings.parse(values(**settings, output_dir="whole")), None, Progress(quiet=True))
    shutil.copytree("whole", "run")
    shutil.rmtree("run/checkpoint-2")
    shutil.rmtree("peft")
    run_training(RunSettings.parse(values(**settings)), "latest", Progress(quiet=True))
    whole, resumed = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    for name in ("optimizer", "random-0"):
        one, other = (load_file(f"{run}/checkpoint-2/{name}.safetensors") for run in ("whole", "run"))
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())


def test_resuming_with_another_one_is_refused(workplace: Path, refused_usage: Callable[..., str]) -> None:
    run_training(RunSettings.parse(values()), None, Progress(quiet=True))
    said = refused_usage("train", "config.yaml", "--init-adapter", "peft", "--resume", "latest")
    assert "init_adapter: peft would be ignored, because run/checkpoint-2 contains its own adapter" in said


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("nowhere", [], "nowhere contains no adapter"),
        ("nowhere.safetensors", [], "nowhere.safetensors contains no adapter"),
        ("peft", ["lora.rank=8"], "lora.rank: the adapter in peft has rank 4, not 8"),
        ("peft", ["lora.alpha=4"], "lora.alpha: the adapter in peft has a scale (alpha / rank) of 1.5, not 1"),
        ("peft", ["lora.target_modules=[q, k]"], "lora.target_modules: the adapter in peft is on other layers"),
        ("peft", ["model=tiny-ti2v"], "peft/adapter_model.safetensors does not match the model: blocks.2"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    path: str,
    changes: list[str],
    said: str,
    mode: list[str],
    workplace: Path,
    refused_usage: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("frostline.models.checkpoints.loading.load_components", load)
    arguments = ["train", "config.yaml", *changes, "--init-adapter", path]
    if mode:
        result = CliRunner().invoke(app, [*arguments, *mode])
        assert result.exit_code == 1
        assert said in " ".join(result.output.split())
    else:
        assert said in refused_usage(*arguments)
    assert not (workplace / "run").exists()
