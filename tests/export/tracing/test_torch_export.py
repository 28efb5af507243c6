"""Tracing at sizes that the tracer would treat as constants: 1, and ranges of one size."""

from pathlib import Path

import pytest
import torch

from frostline.config import LoraSettings
from frostline.export.parity import compare
from frostline.export.tracing.onnx import trace_onnx
from frostline.export.tracing.torch_export import trace_program
from frostline.models.checkpoints.loading import load_components
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.backends.openvino import OpenVinoRunner
from frostline.runtime.stage import Network, Stage
from frostline.stages.shapes import parse_shapes
from frostline.stages.staged_model import stage_model
from frostline.stages.wan.family import video_model

pytestmark = pytest.mark.timeout(400)

CPU = torch.device("cpu")
ONE = "video:1x5x3x64x64"


def stages(min_shapes: str, opt_shapes: str, max_shapes: str) -> dict[str, Stage]:
    shapes = parse_shapes(min_shapes, opt_shapes, max_shapes)
    return stage_model(video_model(load_components("tiny"), LoraSettings()), (), shapes).stages


def assert_equal_to_torch(stage: Stage, network: Network, folder: Path) -> None:
    path = folder / f"{network.name}.onnx"
    trace_onnx(network, path)
    for runner in (OnnxRuntimeRunner(path, network, CPU), OpenVinoRunner(path, network)):
        for size in ("opt", "min"):
            inputs = network.samples(size)
            for measured in compare(network.name, size, network.reference(inputs), runner(**inputs), stage.tolerance):
                assert measured.passed, (runner, measured)


def test_one_sample_is_the_typical_batch(tmp_path: Path) -> None:
    """Keep all dimensions dynamic, as a run at another batch size shows."""
    made = stages("", ONE, "")
    for stage, name in (("vae_encoder", "first"), ("denoiser", "denoiser")):
        network = next(each for each in made[stage].networks if each.name == name)
        assert network.samples("opt")[network.inputs[0].name].shape[0] == 1
        assert_equal_to_torch(made[stage], network, tmp_path)
    network = made["vae_encoder"].networks[0]
    runner = OnnxRuntimeRunner(tmp_path / "first.onnx", network, CPU)
    pair = {"video": torch.randn(3, 3, 1, 64, 32)}
    expected, actual = network.reference(pair), runner(**pair)
    torch.testing.assert_close(actual["latents"], expected["latents"], atol=1e-4, rtol=0)


def test_fixed_shapes_are_constants_of_the_graph(tmp_path: Path) -> None:
    made = stages(ONE, ONE, ONE)
    network = made["vae_encoder"].networks[0]
    program = trace_program(network)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    video = next(node.meta["val"] for node in placeholders if node.name in program.graph_signature.user_inputs)
    assert tuple(video.shape) == (1, 3, 1, 64, 64)
    assert all(isinstance(extent, int) for extent in video.shape)
    assert_equal_to_torch(made["vae_encoder"], network, tmp_path)
