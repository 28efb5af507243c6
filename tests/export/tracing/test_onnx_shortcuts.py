"""Shortcuts in the translation to ONNX change no byte of the file, or at least no value that it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from onnxruntime import InferenceSession
from small_model import small_stages
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from frostline.export.tracing import onnx
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec

COUNT = Dimension("count", 2, 3, 8)


class Of(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.compute = compute

    def forward(self, rows: Tensor) -> Tensor:
        return self.compute(rows * self.scale)


@contextmanager
def long_way() -> Iterator[None]:
    yield


def written(network: Network, path: Path) -> bytes:
    onnx.trace_onnx(network, path)
    return path.read_bytes()


def assert_same_bytes(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(network, tmp_path / "short.onnx")
    monkeypatch.setattr(onnx, "shortcuts", long_way)
    assert found == written(network, tmp_path / "long.onnx")


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + torch.ones(1, dtype=torch.float64),
        lambda x: (x > 0.5) * x + torch.arange(4),
        lambda x: torch.pow(2, x) / x.shape[0],
        lambda x: (x * 10).long() / 3 + (x > 0).sum(1, keepdim=True) * 2,
        lambda x: torch.cat([x[:, :2], x[:, 2:], x[:, :2]], 1).half() + 1.5,
        lambda x: torch.where(x > 0.5, x, 1) - x.mean(),
    ],
    ids=["double", "bool_and_int", "scalar_to_the_power", "integers_divided", "slices", "where"],
)
def test_types_are_promoted_alike(
    compute: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TensorSpec("rows", (COUNT, 4), fill=lambda shape, generator: torch.rand(shape))
    assert_same_bytes(Network("one", Of(compute).requires_grad_(False), (spec,), ("result",)), tmp_path, monkeypatch)


@pytest.mark.parametrize("stage", ["text_encoder", "denoiser", "face_detector"])
def test_networks_are_written_alike(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bytes(small_stages()[stage].networks[0], tmp_path, monkeypatch)


def batch_norm() -> nn.Module:
    module = nn.BatchNorm1d(4)
    with torch.no_grad():
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(4, generator=torch.Generator().manual_seed(0)) + 0.5)
    return module


def read_twice(x: Tensor) -> Tensor:
    doubled = x * 2
    return functional.relu(doubled.view(-1, 2, 2), inplace=True).flatten(1) + doubled


def of_another_type(x: Tensor) -> Tensor:
    return (x * 3).half().add_(x)


ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: functional.relu(x - 1, inplace=True),
    "add": lambda x: (x * 2).add_(x),
    "masked_fill": lambda x: (x * 2).masked_fill_(x > 1, 7.0),
    "rsub": lambda x: 1.5 - x,
    "min": lambda x: torch.min(x, x * x),
    "average": lambda x: functional.adaptive_avg_pool2d(x.view(-1, 1, 2, 2), 1).flatten(1),
    "batch_norm": batch_norm(),
}
RETRACED: dict[str, Callable[[Tensor], Tensor]] = {
    "read_twice": read_twice,
    "of_another_type": of_another_type,
    "rsub_with_alpha": lambda x: torch.rsub(x, 1.5, alpha=2),
    "average_of_parts": lambda x: functional.adaptive_avg_pool2d(x.view(-1, 1, 2, 2), (1, 2)).flatten(1),
}


@pytest.mark.parametrize(
    ("name", "retraced"), [*((name, False) for name in ALONE), *((name, True) for name in RETRACED)]
)
def test_operators_are_replaced_only_by_equal_ones(
    name: str, retraced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[ExportedProgram] = []
    original = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram, "run_decompositions", lambda self, *of: calls.append(self) or original(self, *of)
    )
    network = Of({**ALONE, **RETRACED}[name]).requires_grad_(False).eval()
    spec = TensorSpec("rows", (COUNT, 4), fill=lambda shape, generator: torch.rand(shape, generator=generator) * 2 - 1)
    onnx.trace_onnx(Network("one", network, (spec,), ("result",)), tmp_path / "one.onnx")
    assert bool(calls) == retraced

    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    (found,) = InferenceSession(tmp_path / "one.onnx").run(None, {"rows": rows.numpy()})
    numpy.testing.assert_allclose(found, network(rows).numpy(), rtol=1e-6, atol=1e-6)
