"""`frostline engines export`: files and script run without frostline, and compute the same as PyTorch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_model import network_of, small_stages
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError, EngineError, FrostlineError
from frostline.export.publish import publish
from frostline.models.lora.inject import live_scale
from frostline.runtime.engines.store import VerifiedEngine
from frostline.stages.denoiser import REFERENCE

SmallEngine = Callable[[str], VerifiedEngine]


@pytest.fixture(scope="module")
def engine(small_engine: SmallEngine) -> VerifiedEngine:
    return small_engine("denoiser")


@pytest.fixture(scope="module")
def published(engine: VerifiedEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "denoiser"
    root = str(engine.path.parents[2])
    result = CliRunner().invoke(app, ["engines", "export", engine.manifest.key[:8], str(folder), "--engines-dir", root])
    assert result.exit_code == 0, result.output
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script alone: `-I` keeps this project off the path."""
    command = [sys.executable, "-I", str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def adapter_in(folder: Path, **config: object) -> Path:
    """Write the small denoiser's LoRA in PEFT's format, with a scale of 2; return its folder."""
    live = network_of("denoiser", "denoiser").live
    tensors = {
        f"base_model.model.{name.removeprefix('lora.')}.weight": tensor.detach().numpy()
        for name, tensor in live.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16, **config}))
    return folder


def test_the_folder_has_the_engines_files_and_a_script(published: Path, engine: VerifiedEngine) -> None:
    assert sorted(path.name for path in published.iterdir()) == ["denoiser.onnx", "run.py"]
    assert (published / "denoiser.onnx").read_bytes() == (engine.path / "denoiser.onnx").read_bytes()


def test_the_script_computes_the_model_with_and_without_a_lora(published: Path, tmp_path: Path) -> None:
    stage, network = small_stages()["denoiser"], network_of("denoiser", "denoiser")
    inputs = network.samples("opt", seed=3)
    np.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in inputs.items() if name != "lora_scale"})
    arguments = ("--inputs", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out.npz"))

    result = run(published, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Predict the flow-matching velocity" in result.stdout
    assert "velocity: float32 (2, 16, 2, 8, 8)" in result.stdout
    base = torch.from_numpy(np.load(tmp_path / "out.npz")["denoiser.velocity"])
    tensors = {name: value for name, value in inputs.items() if name != "lora_scale"}
    torch.testing.assert_close(base, stage.torch(tensors, REFERENCE)["velocity"])

    result = run(published, *arguments, "--lora", str(adapter_in(tmp_path / "adapter")))
    assert result.returncode == 0, result.stderr
    adapted = torch.from_numpy(np.load(tmp_path / "out.npz")["denoiser.velocity"])
    with live_scale(stage.lora_network, torch.tensor(2.0)):
        expected = stage.torch(tensors)["velocity"]
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-4)
    assert (adapted - base).abs().max() > 0.01


def test_a_lora_that_the_script_cannot_apply_is_refused(published: Path, tmp_path: Path) -> None:
    result = run(published, "--lora", str(adapter_in(tmp_path / "adapter", alpha_pattern={"q": 4})))
    assert result.returncode == 1
    assert "the adapter has alpha_pattern" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_stage_of_several_networks_runs_whole(small_engine: SmallEngine, tmp_path: Path) -> None:
    publish(small_engine("face_detector"), tmp_path / "detector")
    result = run(tmp_path / "detector")
    assert result.returncode == 0, result.stderr
    assert [name for name in ("pnet:", "rnet:", "onet:") if name in result.stdout] == ["pnet:", "rnet:", "onet:"]


def test_a_folder_with_files_is_left_alone(engine: VerifiedEngine, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        publish(engine, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_altered_engine_is_not_copied(engine: VerifiedEngine, tmp_path: Path) -> None:
    path = tmp_path / "engines" / engine.path.relative_to(engine.path.parents[2])
    shutil.copytree(engine.path, path)
    with (path / "denoiser.onnx").open("ab") as file:
        file.write(b"more")
    arguments = ["engines", "export", engine.manifest.key, str(tmp_path / "out"), "--engines-dir"]
    error = CliRunner().invoke(app, [*arguments, str(tmp_path / "engines")]).exception
    assert isinstance(error, FrostlineError)
    assert "is refused" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"artifact": "denoiser.engine"}, "has no ONNX files"),
        ({"outputs": [{"name": "velocity", "dtype": "bfloat16"}]}, "bfloat16, which numpy does not have"),
    ],
)
def test_what_only_its_own_backend_runs_is_refused(
    changes: dict[str, object], reason: str, engine: VerifiedEngine, tmp_path: Path
) -> None:
    network = {**engine.manifest.fields()["networks"][0], **changes}
    altered = VerifiedEngine(engine.path, engine.manifest.updated(networks=[network]))
    with pytest.raises(EngineError, match=reason):
        publish(altered, tmp_path / "out")
    assert not (tmp_path / "out").exists()
