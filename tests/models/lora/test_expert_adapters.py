"""Adapters of two experts in one folder: converted to every format and back, and merged into each expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import same_update, with_alpha
from safetensors.torch import load_file
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.lora import (
    FORMATS,
    Adapter,
    merge_adapter,
    read_adapter,
    read_adapters,
    uniform_loras,
    write_adapter,
)
from frostline.models.lora.inject import inject_loras, lora_parameters, save_adapter

PARTS = {"high": "high_noise", "low": "low_noise"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random adapters of both experts of tiny-moe like training; return the folder."""
    folder = tmp_path_factory.mktemp("experts")
    components: Any = load_components("tiny-moe")
    experts = {"low_noise": components.denoiser, "high_noise": components.denoiser_high_noise}
    config = inject_loras([*experts.values()], 4, 8)
    generator = torch.Generator().manual_seed(0)
    for part, model in experts.items():
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, config, folder / part)
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])


def equal(one: Adapter, other: Adapter) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(pair.down, other.layers[layer].down)
        and torch.equal(pair.up, other.layers[layer].up)
        and pair.alpha == other.layers[layer].alpha
        for layer, pair in one.layers.items()
    )


@pytest.mark.parametrize("name", FORMATS)
def test_both_go_through_every_format_and_back(name: str, adapter: Path, tmp_path: Path) -> None:
    """If a format has no alpha, multiply the scale of 2 into B, which is exact."""
    result = invoke("convert", adapter, "--to", name, "--out", tmp_path / "there", "--model", "tiny-moe")
    assert result.exit_code == 0, result.output
    suffix = "" if name == "peft" else ".safetensors"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [f"high_noise{suffix}", f"low_noise{suffix}"]
    result = invoke("convert", tmp_path / "there", "--to", "peft", "--out", tmp_path / "back")
    assert result.exit_code == 0, result.output
    expected, found = read_adapters(adapter), read_adapters(tmp_path / "back")
    assert [*expected] == [*found] == ["high", "low"]
    for expert, pairs in expected.items():
        assert same_update(pairs, found[expert])
        if FORMATS[name].stores_alpha or name == "peft":
            assert equal(pairs, found[expert])
        for layer, pair in pairs.layers.items():
            assert torch.equal(pair.delta(), found[expert].layers[layer].delta())


def test_diffusers_takes_one_file_for_each_transformer(adapter: Path, tmp_path: Path) -> None:
    """Use the prefix `transformer.` for both: diffusers selects the expert with `load_into_transformer_2`."""
    assert invoke("convert", adapter, "--to", "diffusers", "--out", tmp_path).exit_code == 0
    for part in PARTS.values():
        names = [*load_file(tmp_path / f"{part}.safetensors")]
        assert names
        assert all(name.startswith("transformer.blocks.") for name in names)


@pytest.mark.parametrize("expert", PARTS)
def test_one_of_both(expert: str, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    assert invoke("convert", adapter, "--to", "comfyui", "--expert", expert, "--out", out).exit_code == 0
    assert equal(read_adapter(out), read_adapter(adapter / PARTS[expert]))
    # `--expert` names the expert of a single adapter.
    result = invoke("convert", out, "--to", "peft", "--expert", expert, "--out", tmp_path / "o", "--model", "tiny-moe")
    assert result.exit_code == 0, result.output


def test_both_are_merged_as_a_release_has_them(adapter: Path, tmp_path: Path) -> None:
    result = invoke("merge", "tiny-moe", adapter, "--out", tmp_path, "--lora-scale", "0.5")
    assert result.exit_code == 0, result.output
    for expert, part in PARTS.items():
        base = find_files("tiny-moe").networks["denoiser_high_noise" if expert == "high" else "denoiser"]
        expected = merge_adapter(base.read_exact(), read_adapter(adapter / part), 0.5)
        found = load_file(tmp_path / f"{part}_model" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        one = tmp_path / f"{expert}.safetensors"
        result = invoke(*("merge", "tiny-moe", adapter / part, "--expert", expert, "--lora-scale", "0.5", "--out", one))
        assert result.exit_code == 0, result.output
        assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(one).items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "{both}", "--to", "comfyui", "--out", "x.safetensors"], "two files: give a folder"),
        (["convert", "{both}", "--to", "peft", "--out", "{out}", "--model", "tiny"], "but tiny has one expert"),
        (
            ["convert", "{low}", "--to", "peft", "--out", "{out}", "--expert", "both"],
            "does not contain adapters of two experts",
        ),
        (["merge", "tiny-moe", "{both}", "--out", "{out}/x.safetensors"], "two files: give a folder"),
        (
            ["merge", "tiny-moe", "{low}", "--expert", "high", "--out", "{out}/x.safetensors"],
            "does not match the model",
        ),
        (["merge", "tiny", "{low}", "--expert", "high", "--out", "{out}/x.safetensors"], "tiny has one expert"),
        (["merge", "tiny-moe", "{both}", "--expert", "low", "--out", "{out}/x.bin"], "written to a .safetensors file"),
    ],
)
def test_mistakes_at_the_command_line(arguments: list[str], said: str, adapter: Path, tmp_path: Path) -> None:
    places = {"both": adapter, "low": adapter / "low_noise", "out": tmp_path}
    result = invoke(*(argument.format(**places) for argument in arguments))
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
    assert [*tmp_path.iterdir()] == []


def test_folders_that_are_not_clear_are_refused(adapter: Path, tmp_path: Path) -> None:
    pairs = read_adapters(adapter)
    write_adapter(pairs["high"], "comfyui", tmp_path / "high_noise.safetensors")
    with pytest.raises(
        ConfigError, match=r"contains no adapter of the low-noise expert, low_noise/ or low_noise\.safe"
    ):
        read_adapters(tmp_path)
    assert equal(read_adapters(tmp_path, experts="high")["high"], pairs["high"])
    write_adapter(pairs["low"], "peft", tmp_path)
    with pytest.raises(ConfigError, match=r"contains an adapter next to high_noise\.safetensors: remove one"):
        read_adapters(tmp_path)
    write_adapter(pairs["high"], "peft", tmp_path / "high_noise")
    with pytest.raises(ConfigError, match=r"contains both high_noise and high_noise\.safetensors: remove one"):
        read_adapters(tmp_path)


def test_ranks_and_scales_that_differ_become_one(adapter: Path) -> None:
    pairs = read_adapters(adapter)
    loras = uniform_loras({"high": with_alpha(pairs["high"], 1), "low": pairs["low"]})
    assert {(lora.rank, lora.alpha) for lora in loras.values()} == {(4, 4.0)}
    for expert, alpha in (("high", 1), ("low", 8)):
        for layer, (down, up) in loras[expert].layers.items():  # type: ignore[index]
            expected = with_alpha(pairs[expert], alpha).layers[layer].delta()  # type: ignore[index]
            torch.testing.assert_close(up @ down, expected)
