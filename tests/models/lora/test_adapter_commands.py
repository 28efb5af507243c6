"""The commands `frostline adapter …`."""

import json
from pathlib import Path

import pytest
import torch
from adapter_files import make_adapter, output
from safetensors.torch import load_file
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError, DataError
from frostline.models.checkpoints.loading import load_components


def test_the_commands(tmp_path: Path) -> None:
    model, _ = make_adapter(tmp_path / "trained", 8)
    trained, run = str(tmp_path / "trained"), CliRunner().invoke
    comfy = tmp_path / "out" / "comfy.safetensors"
    result = run(app, ["adapter", "convert", trained, "--to", "comfyui", "--precision", "bf16", "--out", str(comfy)])
    assert result.exit_code == 0, result.output
    assert {tensor.dtype for name, tensor in load_file(comfy).items() if "alpha" not in name} == {torch.bfloat16}
    merged = tmp_path / "merged.safetensors"
    assert run(app, ["adapter", "merge", "tiny", trained, "--precision", "fp32", "--out", str(merged)]).exit_code == 0
    # The merged file is a denoiser like in Wan's releases, which loads as part of a list of files.
    tiny = Path(load_components.__code__.co_filename).parents[1] / "tiny" / "weights" / "tiny"
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    others = [
        tiny / "Wan2.1_VAE.safetensors",
        tiny / "models_t5_umt5-xxl-enc.safetensors",
        tiny / "google" / "umt5-xxl",
    ]
    loaded = load_components([merged, *others]).denoiser
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "{adapter}", "--to", "kohya", "--out", "x.safetensors"], "unknown format 'kohya'"),
        (["convert", "{adapter}", "--to", "comfyui", "--out", "folder"], "must be a .safetensors file"),
        (["convert", "nowhere", "--to", "peft", "--out", "folder"], "nowhere contains no adapter"),
        (["merge", "tiny", "{adapter}", "--out", "x.bin"], "written to a .safetensors file"),
        (["merge", "tiny", "{adapter}", "--precision", "int8", "--out", "x.safetensors"], "unknown precision 'int8'"),
        (["merge", "nowhere", "{adapter}", "--out", "x.safetensors"], "nowhere is neither a directory"),
    ],
)
def test_mistakes_at_the_command_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "trained", 4)
    filled = [argument.format(adapter=tmp_path / "trained") for argument in arguments]
    result = CliRunner().invoke(app, ["adapter", *filled])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    make_adapter(tmp_path, 4)
    command = ["adapter", "convert", str(tmp_path), "--to", "comfyui", "--out", "/proc/x.safetensors"]
    merge = [
        "adapter",
        "merge",
        "tiny",
        str(tmp_path),
        "--out",
        str(tmp_path / "adapter_config.json" / "x.safetensors"),
    ]
    for arguments in (command, merge):
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, DataError)
        assert "x.safetensors: cannot be written: " in str(error)


def test_layers_can_be_checked_against_a_model(tmp_path: Path) -> None:
    """Names alone do not show how many blocks a model has."""
    make_adapter(tmp_path / "trained", 4)
    out = tmp_path / "lora.safetensors"
    command = ["adapter", "convert", str(tmp_path / "trained"), "--to", "comfyui", "--out", str(out), "--model"]
    error = CliRunner().invoke(app, [*command, "tiny-ti2v"]).exception
    assert isinstance(error, ConfigError)
    assert "does not match the model: blocks.2" in str(error)
    assert not out.exists()
    assert CliRunner().invoke(app, [*command, "tiny"]).exit_code == 0
