"""Adapters with invalid numbers give the same error wherever the adapter is used, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_tensors, make_adapter, write_flat
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.models.lora import read_adapter
from frostline.train import WanTrainingModule

DOTTED = "diffusion_model.{}"
Q = DOTTED.format("blocks.0.self_attn.q")


def with_tensor(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], Path]:
    """Return a function that writes an adapter file in which the tensor `name` has another value."""

    def spoil(folder: Path) -> Path:
        path = write_flat(
            make_adapter(folder, 8)[1], folder / "lora.safetensors", DOTTED.format, ("lora_down", "lora_up")
        )
        change_tensors(path, lambda tensors: {**tensors, name: value(tensors[name])})
        return path

    return spoil


def with_config(**changes: Any) -> Callable[[Path], Path]:
    """Return a function that writes a PEFT folder with other fields in its config."""

    def spoil(folder: Path) -> Path:
        make_adapter(folder, 8)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        return folder

    return spoil


def without_rank(folder: Path) -> Path:
    path = write_flat(make_adapter(folder, 8)[1], folder / "lora.safetensors", DOTTED.format, ("lora_down", "lora_up"))
    change_tensors(
        path,
        lambda tensors: {
            n: t[:0] if n.endswith("down.weight") else t[:, :0] if n.endswith("up.weight") else t
            for n, t in tensors.items()
        },
    )
    return path


def one_element(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return spoil


NAN, INF = float("nan"), float("inf")
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NaN in A": (
        with_tensor(f"{Q}.lora_down.weight", one_element(NAN)),
        rf"{Q}\.lora_down\.weight has NaN or infinite",
    ),
    "infinity in B": (with_tensor(f"{Q}.lora_up.weight", one_element(-INF)), rf"{Q}\.lora_up\.weight has NaN"),
    "alpha 0": (
        with_tensor(f"{Q}.alpha", torch.zeros_like),
        r"alpha of blocks\.0\.self_attn\.q must be a positive number, not 0\.0",
    ),
    "alpha NaN": (
        with_tensor(f"{Q}.alpha", lambda a: a * NAN),
        r"alpha of blocks\.0\.self_attn\.q must be a positive number, not nan",
    ),
    "alpha infinite": (
        with_tensor(f"{Q}.alpha", lambda a: a * INF),
        r"alpha of blocks\.0\.self_attn\.q must be a positive number, not inf",
    ),
    "alpha negative": (
        with_tensor(f"{Q}.alpha", torch.neg),
        r"alpha of blocks\.0\.self_attn\.q must be a positive number, not -8\.0",
    ),
    "two alphas": (
        with_tensor(f"{Q}.alpha", lambda a: torch.stack([a, a])),
        r"must be one number, but has shape \(2,\)",
    ),
    "rank 0": (without_rank, "have rank 0"),
    "stated alpha null": (with_config(lora_alpha=None), "lora_alpha must be a positive number, not null"),
    "stated alpha text": (with_config(lora_alpha="much"), "lora_alpha must be a positive number, not 'much'"),
    "stated alpha NaN": (with_config(lora_alpha=NAN), "lora_alpha must be a positive number, not nan"),
    "stated alpha 0": (with_config(lora_alpha=0), "lora_alpha must be a positive number, not 0"),
    "stated alpha true": (with_config(lora_alpha=True), "lora_alpha must be a positive number, not True"),
    "stated alpha of a layer": (
        with_config(alpha_pattern={"q": INF}),
        "alpha_pattern of q must be a positive number, not inf",
    ),
    "stated rank null": (with_config(r=None), "r must be a positive number, not null"),
    "stated rank of a layer": (
        with_config(rank_pattern={"q": 2.5}),
        r"rank_pattern of q must be a whole number, not 2\.5",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_numbers_that_cannot_be_are_refused(fault: str, tmp_path: Path) -> None:
    spoil, said = FAULTS[fault]
    with pytest.raises(ConfigError, match=said):
        read_adapter(spoil(tmp_path))


@pytest.fixture(scope="module")
def module(make_module: Callable[..., WanTrainingModule]) -> WanTrainingModule:
    return make_module(lora={"rank": 4, "alpha": 8})


@pytest.mark.parametrize("fault", ["NaN in A", "alpha 0", "alpha NaN", "rank 0", "stated alpha null"])
def test_every_use_refuses_them_alike(fault: str, tmp_path: Path, module: WanTrainingModule) -> None:
    """Check convert, merge, sample and loading into a module: nothing is written, and the module keeps its LoRA."""
    path = FAULTS[fault][0](tmp_path / "adapter")
    before = {name: parameter.clone() for name, parameter in module.trainable_parameters().items()}
    with pytest.raises(ConfigError) as refusal:
        module.load_adapter(path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.trainable_parameters().items())
    out = tmp_path / "out"
    size = ["--height", "32", "--width", "32", "--num-frames", "1"]
    for command in (
        ["adapter", "convert", str(path), "--to", "comfyui", "--out", str(out / "lora.safetensors")],
        ["adapter", "merge", "tiny", str(path), "--out", str(out / "merged.safetensors")],
        ["sample", "tiny", "--adapter", str(path), "--prompt", "x", *size, "--out", str(out / "clip.mp4")],
    ):
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, ConfigError)
        assert str(error) == str(refusal.value)
    assert not out.exists()


def test_alpha_as_text_is_read(tmp_path: Path) -> None:
    assert {pair.alpha for pair in read_adapter(with_config(lora_alpha="16")(tmp_path)).layers.values()} == {16}
