"""What shortens a translation to ONNX changes no byte of the file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_model import small_stages
from torch import Tensor, nn

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
