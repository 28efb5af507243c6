"""The TensorRT runner on a stand-in for the GPU: what it binds, allocates, records and replays."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from frostline.errors import EngineError
from frostline.runtime.backends.tensorrt import TensorRTRunner
from frostline.runtime.dimension import Dimension
from frostline.runtime.stage import Network, TensorSpec


class Context:
    """An execution context that computes on the CPU, at the addresses it is given: y = 2 x + live."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: list[tuple[int, int]] = []
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def update_device_memory_size_for_shapes(self) -> int:
        return 64

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch.append((address, size))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        rows, columns = self.shapes["x"]
        array = ctypes.c_float * (rows * columns)
        x, y = (array.from_address(self.addresses[name]) for name in "xy")
        live = (ctypes.c_float * 1).from_address(self.addresses["live"])

        def kernel() -> None:
            y[:] = [2 * value + live[0] for value in x]

        if Graph.recording is None:
            kernel()
        else:
            Graph.recording.kernels.append(kernel)
        return True


class Graph:
    """A CUDA graph of such launches: while one is recorded, nothing is computed."""

    recording: "Graph | None" = None

    def __init__(self) -> None:
        self.kernels: list[Callable[[], None]] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()

    @staticmethod
    @contextlib.contextmanager
    def record(graph: "Graph") -> Iterator[None]:
        Graph.recording = graph
        yield
        Graph.recording = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A module like `tensorrt` whose only engine is `Context`."""
    context = Context()
    engine = SimpleNamespace(
        create_execution_context=lambda strategy: context,
        get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None)

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    yield SimpleNamespace(
        ILogger=type("ILogger", (), {"WARNING": 2, "__init__": lambda self: None}),
        Runtime=lambda logger: runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        context=context,
    )


@pytest.fixture
def doubled() -> Network:
    """The network of `Context`."""
    x = TensorSpec("x", (Dimension("n", 1, 2, 8), 4))
    return Network("n", nn.Linear(4, 4), (x,), ("y",), {"live": torch.ones(1)}, (TensorSpec("live", (1,)),))


def test_the_runner_binds_addresses_and_allocates_outputs(fake: Any, doubled: Network) -> None:
    runner = TensorRTRunner(fake, b"plan", doubled, torch.device("cpu"))
    values = torch.randn(4, 3).t()
    assert not values.is_contiguous()
    first = runner(x=values)["y"]
    torch.testing.assert_close(first, 2 * values + 1)
    assert fake.context.addresses == {
        "x": fake.context.addresses["x"],
        "live": doubled.live["live"].data_ptr(),
        "y": first.data_ptr(),
    }
    assert fake.context.streams == [7]
    assert [size for _, size in fake.context.scratch] == [64]
    with pytest.raises(EngineError, match="engine serves"):
        runner(x=torch.zeros(9, 4))
    with pytest.raises(EngineError, match="TensorRT cannot load n: it does not say why"):
        TensorRTRunner(fake, b"other", doubled, torch.device("cpu"))


def test_from_the_second_call_of_a_shape_on_a_cuda_graph_is_replayed(fake: Any, doubled: Network) -> None:
    runner, live = TensorRTRunner(fake, b"plan", doubled, torch.device("cpu")), doubled.live["live"]
    outputs = []
    for call in range(4):
        live.fill_(call)
        values = torch.randn(4, 3).t()
        outputs.append((runner(x=values)["y"], 2 * values + call))
    # One launch, then another to settle the shape and one to record; two replays launch nothing.
    assert len(fake.context.streams) == 3
    for actual, expected in outputs:
        torch.testing.assert_close(actual, expected)
    other = torch.randn(2, 4)
    torch.testing.assert_close(runner(x=other)["y"], 2 * other + 3)
    assert len(fake.context.streams) == 4
    # Where the live tensor has moved, what was recorded holds no more.
    doubled.live["live"] = moved = torch.full((1,), 9.0)
    torch.testing.assert_close(runner(x=values)["y"], 2 * values + 9)
    moved.fill_(8)
    torch.testing.assert_close(runner(x=values)["y"], 2 * values + 8)


def test_what_cannot_be_recorded_is_launched(
    fake: Any, doubled: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def refuse(graph: Graph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    runner, values = TensorRTRunner(fake, b"plan", doubled, torch.device("cpu")), torch.randn(3, 4)
    for _ in range(4):
        torch.testing.assert_close(runner(x=values)["y"], 2 * values + 1)
    assert [record.message for record in caplog.records] == [
        "no CUDA graph is recorded, every call launches each kernel: operation not permitted when stream is capturing"
    ]
