"""Tracing to ONNX: dynamic dimensions, live inputs, where weights are stored, and networks that cannot be traced."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.export.tracing import onnx as onnx_export
from frostline.export.tracing import onnx_shortcuts
from frostline.export.tracing.onnx import trace_onnx
from frostline.runtime.backends.base.options import OPSET
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


class Scaled(nn.Module):
    """`y = live * (x W) + offset` and `z = [x, x]`: a network with two outputs, a weight and a live input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, offset: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        return live * (x @ self.weight) + offset, torch.cat([x, x], dim=1)


def network() -> Network:
    rows, columns = Dimension("rows", 1, 4, 16), Dimension("pairs", 1, 2, 8, multiple=2)
    return Network(
        "scaled",
        Scaled().eval(),
        (TensorSpec("x", (rows, columns, 6)), TensorSpec("offset", (rows, columns, 6))),
        ("y", "z"),
        live={"live": torch.full((1,), 3.0)},
        live_specs=(TensorSpec("live", (1,)),),
    )


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "scaled.onnx"
    trace_onnx(network(), path)
    return path


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_inputs_and_outputs_have_their_names_and_open_dimensions(traced: Path) -> None:
    model = onnx.load(traced)
    assert [value.name for value in model.graph.input] == ["x", "offset", "live"]
    assert [value.name for value in model.graph.output] == ["y", "z"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in shape] == [True, True, False]
    assert shape[2].dim_value == 6
    assert model.opset_import[0].version == OPSET
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(("rows", "columns"), [(4, 2), (1, 2), (1, 16), (16, 4), (3, 6)])
def test_any_shape_in_the_range_runs(rows: int, columns: int, traced: Path) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, offset = torch.randn(2, rows, columns, 6, generator=generator)
    live = torch.tensor([-2.0])
    y, z = session(traced).run(None, {"x": x.numpy(), "offset": offset.numpy(), "live": live.numpy()})
    expected_y, expected_z = Scaled()(x, offset, live)
    torch.testing.assert_close(torch.from_numpy(y), expected_y.detach(), atol=1e-5, rtol=0)
    assert torch.equal(torch.from_numpy(z), expected_z)


def test_small_weights_are_inside_the_file(traced: Path) -> None:
    assert [path.name for path in traced.parent.iterdir()] == ["scaled.onnx"]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_EMBEDDED_BYTES", 1)
    path = tmp_path / "scaled.onnx"
    trace_onnx(network(), path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"scaled.onnx", "scaled.onnx.data"}
    x = torch.randn(2, 4, 6)
    y, _ = session(path).run(
        None, {"x": x.numpy(), "offset": torch.zeros_like(x).numpy(), "live": torch.ones(1).numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(y), (x @ Scaled().weight).detach(), atol=1e-5, rtol=0)


def test_the_module_and_its_live_tensors_are_left_as_they_were() -> None:
    traced = network()
    weight = traced.module.weight.detach().clone()
    live = traced.live["live"]
    trace_onnx(traced, Path("/dev/null"))
    assert torch.equal(traced.module.weight, weight)
    assert traced.live["live"] is live
    assert live.item() == 3
    assert traced.module.weight.requires_grad


@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize(("factor", "renamed"), [(2.0, True), (1.5, False)])
def test_arguments_of_operators_are_read_by_name(named: bool, factor: float, renamed: bool) -> None:
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x, factors = graph.placeholder("x"), [factor, factor]
    if named:
        upsample = graph.call_function(aten._upsample_nearest_exact2d.vec, (x, None), {"scale_factors": factors})
        cast = graph.call_function(aten.to.dtype, (), {"self": x, "dtype": torch.half})
    else:
        upsample = graph.call_function(aten._upsample_nearest_exact2d.vec, (x, None, factors))
        cast = graph.call_function(aten.to.dtype, (x, torch.half))
    for node in (upsample, cast):
        onnx_shortcuts._respell(node)
    assert (upsample.target is aten.upsample_nearest2d.vec) is renamed
    assert (cast.target, cast.args, cast.kwargs) == (aten._to_copy.default, (x,), {"dtype": torch.half})


def test_what_cannot_be_traced_is_named(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum() > 0 else x - self.weight

    spec = TensorSpec("x", (Dimension("rows", 1, 2, 4), 3))
    with pytest.raises(EngineError, match="network branches cannot be"):
        trace_onnx(Network("branches", Branches(), (spec,), ("y",)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
