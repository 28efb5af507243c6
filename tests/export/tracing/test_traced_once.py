"""ONNX files compute the same as PyTorch, and the network is not traced a second time for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from small_model import small_stages
from torch import Tensor, nn
from torch.export import ExportedProgram

from frostline.export.tracing.onnx import trace_onnx, translate
from frostline.export.tracing.torch_export import trace_program
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec

SIDE, COUNT = Dimension("side", 2, 6, 12), Dimension("count", 1, 3, 8)


class Of(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.compute = compute

    def forward(self, pictures: Tensor) -> Tensor:
        return self.compute(pictures * self.scale)


def changed_in_place(x: Tensor) -> Tensor:
    part = x[:, :1]
    part.add_(1)
    return x.clamp_(max=2) + part


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
        lambda x: F.interpolate(x, size=(7, 5), mode="nearest-exact"),
        lambda x: x.to(torch.float64).sqrt(),
        lambda x: x.to(torch.int32),
        lambda x: x.to(torch.zeros(1, dtype=torch.float64)) / 3,
        lambda x: x.to("cpu", torch.float16),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.int64)),
        changed_in_place,
        lambda x: F.batch_norm(x, torch.full((2,), 0.5), torch.full((2,), 4.0)),
    ],
    ids=["twice", "one_and_a_half", "size", "double", "int", "like", "device", "type_as", "in_place", "batch_norm"],
)
def test_operators_are_computed_as_torch_does(compute: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    spec = TensorSpec("pictures", (COUNT, 2, SIDE, SIDE), fill=lambda shape, generator: torch.rand(shape))
    network = Network("one", Of(compute).eval().requires_grad_(False), (spec,), ("result",))
    trace_onnx(network, tmp_path / "one.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx")
    for shape in ((3, 2, 6, 6), (1, 2, 3, 3)):
        pictures = torch.rand(shape)
        expected = compute(3 * pictures)
        (actual,) = session.run(None, {"pictures": pictures.numpy()})
        assert actual.dtype == expected.numpy().dtype
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", ["denoiser", "face_detector", "vae_encoder"])
def test_no_network_is_traced_a_second_time(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes most of the time of an export."""

    def decompose(*_: object) -> ExportedProgram:
        raise AssertionError("decomposes")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", decompose)
    network = small_stages()[stage].networks[0]
    program = trace_program(network)
    before = [(node.target, node.args) for node in program.graph.nodes]
    translate(network, program, 18)
    assert [(node.target, node.args) for node in program.graph.nodes] == before, (
        "the program must not change, because other backends use it, too"
    )
