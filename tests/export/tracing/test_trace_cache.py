"""A stage is traced once for all backends."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from frostline.export.exporter import export_stage
from frostline.export.tracing import torch_export as program_file
from frostline.export.tracing.trace_cache import Traces
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Network, Stage, TensorSpec

BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sigmoid() * x


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    module = Gated().eval().requires_grad_(False)
    return Network("gated", module, (TensorSpec("x", (Dimension("rows", 1, 2, 8), 4)),), ("y",))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each network that is traced."""
    names: list[str] = []
    trace = program_file.trace_program

    def counting(network: Network) -> ExportedProgram:
        names.append(network.name)
        return trace(network)

    monkeypatch.setattr(program_file, "trace_program", counting)
    return names


def test_engines_of_every_backend_come_from_one_trace(
    network: Network, traced: list[str], tmp_path: Path, session_signing_key: Path
) -> None:
    for backend in BACKENDS[1:]:
        pytest.importorskip(backend.replace("-", "_"))
    tolerance = Tolerance(1e-6, 1e-5, 0.999999)
    stage = Stage(name="gated", model="small", networks=(network,), tolerance=tolerance)
    traces = Traces()
    for backend in BACKENDS:
        exported = export_stage(stage, backend, EngineStore(tmp_path), traces=traces)
        assert exported.built
        assert exported.unverified or exported.worst.passed
    assert traced == ["gated"]


def test_translating_leaves_the_program_as_it_was(network: Network, traced: list[str]) -> None:
    traces = Traces()
    before = str(traces.program(network).graph)
    first = traces.onnx(network, 20).model_proto.SerializeToString()
    assert str(traces.program(network).graph) == before
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(traces.program(network).module()(x), network.module(x), atol=0, rtol=0)
    assert traces.onnx(network, 20).model_proto.SerializeToString() == first
    assert {opset.version for opset in onnx.load_from_string(first).opset_import if not opset.domain} == {20}
    assert traced == ["gated"]
