"""Annotations of ONNX files: names of axes, metadata, and nothing about the machine on which they were written."""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import quantize_dynamic
from small_model import small_stages

from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import VerifiedEngine

STAGES = ("denoiser", "vae_decoder", "face_detector")


@pytest.fixture(scope="module")
def files(small_engine: Callable[[str], VerifiedEngine]) -> dict[str, Path]:
    """Return the ONNX file of each network of `STAGES`, by `<stage>.<network>`."""
    engines = {stage: small_engine(stage) for stage in STAGES}
    return {
        f"{stage}.{network.name}": engine.path / network.artifact
        for stage, engine in engines.items()
        for network in engine.manifest.networks
    }


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_axes_of_inputs_and_outputs_are_named(files: dict[str, Path]) -> None:
    graph = onnx.load(files["denoiser.denoiser"]).graph
    named = {value.name: axes(value) for value in (*graph.input, *graph.output)}
    assert named["latents"] == ["batch", 16, "latent_frames", "height/8", "width/8"]
    assert named["velocity"] == ["batch", 16, "latent_frames", "height/8", "width/8"]
    assert named["timestep"] == ["batch"]
    assert named["lora.blocks.0.self_attn.q.lora_A"] == ["rank", 64]
    graph = onnx.load(files["vae_decoder.next"]).graph
    named = {value.name: axes(value) for value in (*graph.input, *graph.output)}
    assert named["latents"] == ["batch", 16, 1, "height/8", "width/8"]
    assert named["video"] == ["batch", 3, 4, "height", "width"]


def test_no_axis_keeps_the_name_of_the_tracer(files: dict[str, Path]) -> None:
    for path in files.values():
        graph = onnx.load(path).graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            assert not [axis for axis in axes(value) if re.search(r"\b[su]\d", str(axis))], (path, value.name)


def test_files_say_nothing_of_this_machine(files: dict[str, Path]) -> None:
    for path in files.values():
        content = path.read_bytes()
        assert str(Path.cwd()).encode() not in content, path
        assert b"site-packages" not in content, path
        assert b".py" not in content, path
        model = onnx.load(path)
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node), path


def test_files_say_what_they_are(files: dict[str, Path]) -> None:
    model = onnx.load(files["denoiser.denoiser"])
    assert (model.producer_name, model.producer_version) == ("frostline", version("frostline"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    stage = small_stages()["denoiser"]
    assert metadata == {
        "model": stage.model,
        "stage": "denoiser",
        "network": "denoiser",
        "precision": "fp32",
        "model_license": "not stated",
    }
    assert "lora_scale: float32 ()" in model.doc_string
    assert "latents: float32 (batch, 16, latent_frames, height/8, width/8)" in model.doc_string
    assert "lora_scale: alpha / rank, or 0" in model.doc_string
    detector = onnx.load(files["face_detector.pnet"])
    assert {entry.key: entry.value for entry in detector.metadata_props}["model_license"] == "MIT"


def test_quantize_dynamic_takes_the_files(files: dict[str, Path], tmp_path: Path) -> None:
    """Call it as users do. Only the correlation of the outputs is checked, because the weights are random."""
    path = tmp_path / "quantized.onnx"
    quantize_dynamic(str(files["denoiser.denoiser"]), str(path))
    inputs = {name: tensor.numpy() for name, tensor in small_stages()["denoiser"].networks[0].samples("opt").items()}
    outputs = []
    for model in (files["denoiser.denoiser"], path):
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        live = {
            value.name: np.zeros([8 if isinstance(axis, str) else axis for axis in value.shape], np.float32)
            for value in session.get_inputs()
            if value.name not in inputs
        }
        outputs.append(session.run(None, {**inputs, **live})[0])
    assert path.stat().st_size < files["denoiser.denoiser"].stat().st_size
    assert np.corrcoef(outputs[0].ravel(), outputs[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("multiple", "axis"), [(16, "height"), (2, "height/8"), (1, "height/16"), (32, "2*height"), (24, "3*height/2")]
)
def test_an_axis_is_named_by_its_part_of_the_whole(multiple: int, axis: str) -> None:
    assert Dimension("height", 1, 2, 3, multiple, whole=16).axis == axis
