"""A model family is one folder: a toy family with another VAE, conditions and blocks supports everything."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

import frostline.stages
from frostline.cli import app
from frostline.errors import ConfigError
from frostline.models.lora import read_adapter
from frostline.models.video_shape import VideoShape
from frostline.progress import Progress
from frostline.stages.families import family_of
from frostline.train import WanTrainingModule
from frostline.train.dry_run import print_dry_run
from frostline.train.launch import run_training
from frostline.train.memory import memory_profile
from frostline.train.memory.plan import memory_plan
from frostline.train.sample import sample_clip
from frostline.train.sample_settings import SampleSettings
from frostline.train.settings import RunSettings
from frostline.video import write_video

FAMILIES = Path(__file__).parents[1] / "families"
LORA = {"rank": 4}
REWARD = {"type": "sharpness", "weight": 1.0}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a model of the toy family, which is added to the folders of families."""
    monkeypatch.setattr(frostline.stages, "__path__", [*frostline.stages.__path__, str(FAMILIES)])
    folder = tmp_path / "toy-model"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps({"seed": 3}))
    yield folder
    for name in [name for name in sys.modules if name.startswith("frostline.stages.toy")]:
        del sys.modules[name]
    if hasattr(frostline.stages, "toy"):
        del frostline.stages.toy


@pytest.fixture
def engines(toy: Path, tmp_path: Path) -> Path:
    root = tmp_path / "engines"
    arguments = ["export", str(toy), "--stages", ",".join(family_of(toy).STAGES), "--engines-dir", str(root)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return root


def module_of(toy: Path, **others: Any) -> WanTrainingModule:
    torch.manual_seed(0)
    module = WanTrainingModule.from_pretrained(
        toy, **{"lora": LORA, "rewards": [REWARD], "kl_weight": 0.5, "gradient_checkpointing": "none", **others}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def clips(count: int, frames: int = 9) -> dict[str, Any]:
    video = torch.rand(count, frames, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    return {"prompt": [f"prompt {index}" for index in range(count)], "video": video}


def loss_and_gradient(module: WanTrainingModule, data: dict[str, Any]) -> tuple[float, Tensor]:
    loss, _, _ = module(data)
    loss.backward()
    gradients = [parameter.grad for parameter in module.trainable_parameters().values()]
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_a_step_on_engines_equals_pytorch(toy: Path, engines: Path) -> None:
    expected = loss_and_gradient(module_of(toy, plan="torch", engines=None), clips(2))
    module = module_of(toy, plan="onnxruntime", engines=engines)
    loss, gradient = loss_and_gradient(module, clips(2))
    served = {name: choice.backend for name, choice in module.runtime.plan.items()}
    assert served == dict.fromkeys(family_of(toy).STAGES, "onnxruntime")
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert torch.nn.functional.cosine_similarity(gradient, expected[1], dim=0) > 0.99999
    assert gradient.norm() > 0


@pytest.mark.parametrize("kind", ["block", "full"])
def test_what_backward_recomputes_changes_nothing(kind: str, toy: Path, engines: Path) -> None:
    loss, gradient = loss_and_gradient(module_of(toy, plan="torch", engines=None), clips(2))
    module = module_of(toy, plan="onnxruntime", engines=engines, gradient_checkpointing=kind)
    other, recomputed = loss_and_gradient(module, clips(2))
    assert other == pytest.approx(loss, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(recomputed, gradient, dim=0) > 0.99999


@pytest.mark.parametrize("kind", ["none", "block", "full"])
def test_blocks_in_main_memory_change_nothing_on_engines_either(kind: str, toy: Path, engines: Path) -> None:
    """Find the engine by the weights, wherever they are, and use it for the frozen calls of the live denoiser."""
    how: Any = {"plan": "onnxruntime", "engines": engines, "gradient_checkpointing": kind}
    loss, gradient = loss_and_gradient(module_of(toy, **how), clips(2))
    module = module_of(toy, **how, offload_blocks=4)
    other, again = loss_and_gradient(module, clips(2))
    assert module.runtime.plan["denoiser"].backend == "onnxruntime"
    assert other == loss
    assert torch.equal(again, gradient)


def test_what_is_given_stays_and_what_has_no_lora_is_the_reference(toy: Path) -> None:
    module = module_of(toy, plan="torch", engines=None)
    conditioning = module.forward_preprocess(clips(2))
    assert conditioning.latent_shape == (4, 2, 4, 6)
    assert {name: tuple(tensor.shape) for name, tensor in conditioning.conditions.items()} == {
        "context": (2, 8, 32),
        "pooled": (2, 32),
        "first_frame": (2, 4, 1, 4, 6),
    }
    videos = module.generate(conditioning, module.noise(conditioning))
    assert videos.shape == (2, 9, 3, 32, 48)
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.zero_()
    _, _, kl = module(clips(2))
    assert kl.item() <= 1e-12


def settings_of(toy: Path, folder: Path, **others: Any) -> RunSettings:
    source = folder / "clips"
    source.mkdir(exist_ok=True)
    for index, video in enumerate(clips(2, 17)["video"]):
        write_video(source / f"{index}.mp4", video, fps=8)
        (source / f"{index}.txt").write_text(f"clip {index}")
    values = {
        "model": str(toy),
        "output_dir": folder / "run",
        "lora": LORA,
        "rewards": [REWARD],
        "device": "cpu",
        "data": {"source": source, "num_frames": 17, "height": 32, "width": 48},
        "train": {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2},
        "plan": {"engines": folder / "engines"},
    }
    return RunSettings.parse({**values, **others})


def test_it_trains_and_resumes(toy: Path, tmp_path: Path) -> None:
    settings = settings_of(toy, tmp_path)
    run_training(settings, None, Progress(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["kl_loss"] > 0
    longer = settings_of(toy, tmp_path, train={"max_train_steps": 3, "learning_rate": 1e-2})
    run_training(longer, "latest", Progress(quiet=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_dry_run_and_the_memory_plan_know_its_stages(toy: Path, tmp_path: Path) -> None:
    console = Console(width=200, record=True, force_terminal=False)
    assert print_dry_run(settings_of(toy, tmp_path), console)
    text = console.export_text()
    for stage in family_of(toy).STAGES:
        assert stage in text
    settings = settings_of(toy, tmp_path)
    plan = memory_plan(toy, settings, VideoShape(1, 17, 32, 48), dtype=torch.float32)
    module = module_of(toy, plan="torch", engines=None)
    for stage in plan.stages:
        own = sum(p.nbytes for p in module.model.stage_parameters()[stage.stage])
        assert stage.weights >= own, stage.stage
    assert plan.adapter == sum(p.nbytes for p in module.trainable_parameters().values())


def test_blocks_beyond_the_first_few_are_extrapolated_exactly(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = module_of(toy, plan="torch", engines=None).model, VideoShape(1, 65, 32, 48)
    few = [memory_profile.measure_live_stages(model, shape, kind) for kind in ("none", "block", "full")]
    monkeypatch.setattr(memory_profile, "_FEW_BLOCKS", 100)
    monkeypatch.setattr(memory_profile, "_FEW_CHUNKS", 100)
    assert few == [memory_profile.measure_live_stages(model, shape, kind) for kind in ("none", "block", "full")]


def test_a_clip_is_sampled(toy: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "start.mp4", clips(1)["video"][0], fps=8)
    settings = {"model": str(toy), "prompt": "x", "image": tmp_path / "start.mp4", "num_frames": 17, "engines": None}
    clip = sample_clip(SampleSettings.parse(settings), tmp_path / "out.mp4")
    assert clip.video.shape == (17, 3, 32, 48)
    with pytest.raises(ConfigError, match=r"num_frames must be 8k\+1 \(1, 9, 17, …\), not 13"):
        SampleSettings.parse({**settings, "num_frames": 13})


@pytest.fixture
def adapter(toy: Path, tmp_path: Path) -> Path:
    """Return the folder of a LoRA of a toy model, saved like in training."""
    module_of(toy, plan="torch", engines=None).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])


def test_its_adapter_is_converted(toy: Path, adapter: Path, tmp_path: Path) -> None:
    family, out = family_of(toy), tmp_path / "lora.safetensors"
    result = invoke("convert", adapter, "--to", "comfyui", "--out", out, "--model", toy)
    assert result.exit_code == 0, result.output
    expected = read_adapter(adapter, family.layer_path)
    converted = read_adapter(out, family.layer_path)
    assert converted.layers.keys() == expected.layers.keys() == {f"blocks.{index}.proj" for index in range(6)}
    for layer, pair in expected.layers.items():
        torch.testing.assert_close(converted.layers[layer].delta(), pair.delta(), atol=1e-6, rtol=1e-5)


def test_its_adapter_is_merged(toy: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    result = invoke("merge", toy, adapter, "--lora-scale", "0.5", "--out", out)
    assert result.exit_code == 0, result.output
    merged = load_file(out)
    base = family_of(toy).load(toy, torch.float32, torch.device("cpu"), False).denoiser.state_dict()
    assert merged.keys() == base.keys()
    pairs = read_adapter(adapter, family_of(toy).layer_path).layers
    for name, weight in base.items():
        pair = pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = weight if pair is None else weight + 0.5 * pair.delta()
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "{adapter}", "--to", "peft", "--out", "{out}"], "layers that the denoiser does not have"),
        (["convert", "{adapter}", "--to", "peft", "--out", "{out}", "--model", "tiny"], "does not have"),
        (["merge", "tiny", "{adapter}", "--out", "{out}.safetensors"], "layers that the denoiser does not have"),
        (
            ["convert", "{adapter}", "--to", "diffusers", "--out", "{out}.safetensors", "--model", "{toy}"],
            "blocks.0.proj does not exist in diffusers",
        ),
    ],
    ids=["no model", "a model of another family", "merged into another family", "unknown to diffusers"],
)
def test_an_adapter_of_another_family_is_refused(
    arguments: list[str], said: str, toy: Path, adapter: Path, tmp_path: Path
) -> None:
    result = invoke(*(part.format(adapter=adapter, out=tmp_path / "out", toy=toy) for part in arguments))
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
    assert not [*tmp_path.glob("out*")]


def test_other_families_are_what_they_were(toy: Path) -> None:
    assert family_of("tiny").__name__ == "frostline.stages.wan.family"  # type: ignore[attr-defined]
    assert family_of(toy).__name__ == "frostline.stages.toy.family"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"data: num_frames must be 4k\+1"):
        RunSettings.parse({"model": "tiny", "data": {"num_frames": 15}})
    with pytest.raises(ConfigError, match=r"data: num_frames must be 8k\+1"):
        RunSettings.parse({"model": str(toy), "data": {"num_frames": 13}})
