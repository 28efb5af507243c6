"""Runs that train one or both of two experts: what they save, and that resumed runs are bit for bit the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from steps import QUICK, Clips

from frostline.errors import CheckpointError, ConfigError
from frostline.train.loop.output_dir import clear_run
from frostline.train.loop.resume import check_fits, find_resume
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.settings import RunSettings, TrainerSettings
from frostline.train.validate_settings import problems

# The high-noise expert computes the first two of three steps.
STEP: dict[str, Any] = {**QUICK, "rewards": [{"type": "own_rewards:Brightness", "weight": 1.0}], "noise_seed": None}
PARTS = ("high_noise", "low_noise")


def run(make_module: Any, folder: Path, experts: str, steps: int, resume: str | None = None) -> Any:
    torch.manual_seed(0)
    module = make_module("tiny-moe", lora_spread=0, **STEP, lora={"rank": 4, "experts": experts})
    settings = TrainerSettings(learning_rate=1e-2, max_train_steps=steps, checkpointing_steps=2, seed=3)
    options = RunOptions(resume=find_resume(folder, resume))
    train(module, Clips(2), settings, folder, options)
    return module


@pytest.fixture(scope="module")
def whole(make_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(make_module, folder, "both", 4)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_both_are_trained_and_saved(whole: Path) -> None:
    names = {f"{part}/{name}" for part in PARTS for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert {*files(whole / "adapter")} == names
    assert (
        names
        < {*files(whole / "checkpoint-4")}
        == names | {*("optimizer.safetensors", "random-0.safetensors", "state.json", "config.yaml", "manifest.json")}
    )
    for part in PARTS:
        # The B matrices of a new LoRA are zero.
        tensors = load_file(whole / "adapter" / part / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)


def test_a_run_that_goes_on_ends_as_one_that_was_left_alone(make_module: Any, whole: Path, tmp_path: Path) -> None:
    run(make_module, tmp_path, "both", 2)
    run(make_module, tmp_path, "both", 4, resume="latest")
    for name in ("adapter", "checkpoint-4"):
        expected, found = files(whole / name), files(tmp_path / name)
        assert expected.keys() == found.keys()
        assert [key for key in expected if expected[key] != found[key]] == []


@pytest.mark.parametrize("experts", ["low", "high"])
def test_one_expert_is_saved_as_one_adapter(experts: str, make_module: Any, tmp_path: Path) -> None:
    module = run(make_module, tmp_path, experts, 2)
    assert {*files(tmp_path / "adapter")} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any(name.startswith(PARTS) for name in module.trainable_parameters())
    again = make_module("tiny-moe", lora_spread=0, lora={"rank": 4, "experts": experts})
    again.load_adapter(tmp_path / "adapter")
    for name, parameter in module.trainable_parameters().items():
        assert torch.equal(again.trainable_parameters()[name], parameter)


def test_the_low_noise_lora_begins_alike_whether_the_other_expert_has_one(make_module: Any) -> None:
    def matrices(experts: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = make_module("tiny-moe", lora_spread=0, lora={"rank": 4, "experts": experts})
        return module.trainable_parameters()

    low, both, again = matrices("low"), matrices("both"), matrices("both")
    assert all(torch.equal(both[f"low_noise.{name}"], matrix) for name, matrix in low.items())
    assert all(torch.equal(again[name], matrix) for name, matrix in both.items())
    assert not torch.equal(*(both[f"{part}.blocks.0.self_attn.q.lora_A.default.weight"] for part in PARTS))


@pytest.mark.parametrize("experts", ["low", "high"])
def test_a_checkpoint_of_other_experts_is_refused(experts: str, make_module: Any, whole: Path, tmp_path: Path) -> None:
    checkpoint = find_resume(whole, "latest")
    assert checkpoint is not None
    settings = RunSettings.parse({"model": "tiny-moe", "lora": {"rank": 4, "experts": experts}})
    message = rf"lora\.experts: the LoRA in .* belongs to both, not {experts}"
    with pytest.raises(ConfigError, match=message):
        check_fits(checkpoint, settings)
    check_fits(checkpoint, RunSettings.parse({"model": "tiny-moe", "lora": {"rank": 4, "experts": "both"}}))
    with pytest.raises(ConfigError, match=r"lora\.rank: .* has rank 4, not 8"):
        check_fits(checkpoint, RunSettings.parse({"model": "tiny-moe", "lora": {"rank": 8, "experts": "both"}}))
    module = make_module("tiny-moe", **STEP, lora={"rank": 4, "experts": experts})
    with pytest.raises(ConfigError, match=message):
        train(module, Clips(2), TrainerSettings(), tmp_path, RunOptions(resume=checkpoint))
    with pytest.raises(
        ConfigError, match=r"contains adapters of two experts \(high_noise, low_noise\): give the path of one"
    ):
        module.load_adapter(whole / "adapter")


def test_the_low_noise_lora_of_a_checkpoint_is_not_taken_for_the_other(make_module: Any, tmp_path: Path) -> None:
    run(make_module, tmp_path, "high", 2)
    checkpoint = find_resume(tmp_path, "latest")
    assert checkpoint is not None
    with pytest.raises(ConfigError, match="belongs to high, not low"):
        check_fits(checkpoint, RunSettings.parse({"model": "tiny-moe", "lora": {"rank": 4}}))
    check_fits(checkpoint, RunSettings.parse({"model": "tiny-moe", "lora": {"rank": 4, "experts": "high"}}))


def test_a_checkpoint_that_lost_an_expert_is_damaged(make_module: Any, tmp_path: Path) -> None:
    run(make_module, tmp_path, "both", 2)
    path = tmp_path / "checkpoint-2" / "high_noise" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 of high_noise/adapter_model\.safetensors does not"):
        find_resume(tmp_path, "checkpoint-2")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"high_noise/adapter_model\.safetensors is missing"):
        find_resume(tmp_path, "checkpoint-2")


def test_the_folder_of_a_run_is_cleared_with_the_adapters_of_both(make_module: Any, tmp_path: Path) -> None:
    run(make_module, tmp_path, "both", 2)
    (tmp_path / "adapter" / "high_noise" / "notes.txt").write_text("mine")
    clear_run(tmp_path)
    assert [*files(tmp_path)] == ["adapter/high_noise/notes.txt"] or {*files(tmp_path)} == {
        ".lock",
        "adapter/high_noise/notes.txt",
    }


@pytest.mark.parametrize("experts", ["high", "both"])
def test_a_model_of_one_expert_has_no_other(experts: str, make_module: Any) -> None:
    message = rf"lora\.experts: {experts}: this model has one expert"
    with pytest.raises(ConfigError, match=message):
        make_module("tiny", lora={"rank": 4, "experts": experts})
    settings = RunSettings.parse({"model": "tiny", "lora": {"experts": experts}, "device": "cpu"})
    assert any(message.replace("\\", "") in str(problem) for problem in problems(settings, runs=False))


def test_the_state_says_whose_lora_it_is(whole: Path) -> None:
    assert json.loads((whole / "checkpoint-4" / "state.json").read_text())["experts"] == "both"
