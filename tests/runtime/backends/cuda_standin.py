"""Mocks of a GPU and of TensorRT, which compute on the CPU, and fail in the cases that NVIDIA documents.

Streams keep what is enqueued until another stream waits for them, so code that forgets to wait reads old values.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from frostline.runtime.backends.tensorrt import execution

# The alignment of torch's memory on a CPU. On a GPU, it is 512 bytes, and TensorRT requires 256.
ALIGNMENT = 64
_NUMBERS = iter(range(1, 10**9))


class Stream:
    """A CUDA stream; the default stream, with handle 0, computes immediately."""

    def __init__(self, device: object = None, handle: int | None = None) -> None:
        self.device = device
        self.cuda_stream = next(_NUMBERS) if handle is None else handle
        self.pending: list[Callable[[], object]] = []
        self.capturing: Graph | None = None

    def wait_stream(self, other: Stream) -> None:
        assert not (self is other and self.capturing), "a stream cannot wait for itself while it is captured"
        assert not other.capturing or other is self, "another stream would become part of the capture"
        other.finish()

    def enqueue(self, work: Callable[[], object]) -> None:
        if self.capturing is not None:
            self.capturing.kernels.append(work)
        elif self.cuda_stream == 0:
            work()
        else:
            self.pending.append(work)

    def finish(self) -> None:
        with _disable_current_modes():
            while self.pending:
                self.pending.pop(0)()


class Graph:
    """A CUDA graph. Nothing is computed while it is captured."""

    captured = 0

    def __init__(self) -> None:
        self.kernels: list[Callable[[], object]] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            current().enqueue(kernel)


class _Here(threading.local):
    stream = Stream(handle=0)


_here = _Here()


def current(device: object = None) -> Stream:
    """Return the current stream of this thread."""
    return _here.stream


class _Copies(TorchDispatchMode):
    """Enqueue copies on the current stream."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            current().enqueue(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """Mock `torch.cuda.stream`."""
    before, _here.stream = _here.stream, stream
    try:
        with _Copies():
            yield
    finally:
        _here.stream = before


@contextlib.contextmanager
def captured(graph: Graph, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
    """Mock `torch.cuda.graph`."""
    assert capture_error_mode == "thread_local", "an allocation in another thread would invalidate the capture"
    assert stream.cuda_stream, "the default stream cannot be captured"
    before, _here.stream = _here.stream, stream
    stream.finish()
    stream.capturing = graph
    try:
        yield
    finally:
        stream.capturing, _here.stream = None, before
    Graph.captured += 1


class Severity(IntEnum):
    """Mock `trt.ILogger.Severity`."""

    ERROR = 1
    WARNING = 2
    VERBOSE = 4


class Context:
    """An execution context, which computes y = 2 x + live at the given addresses and shapes.

    It needs 16 bytes of scratch memory per row, and supports one call at a time.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: list[tuple[int, int]] = []
        self.streams: list[int] = []
        self.state = 0
        self._one_at_a_time = threading.Lock()
        self._in_flight: Stream | None = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._one_at_a_time.acquire(blocking=False), "two threads use one execution context"
        try:
            yield
        finally:
            self._one_at_a_time.release()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        with self._alone():
            if self.shapes.get(name) != shape:
                self.state += 1
            self.shapes[name] = shape
            return name in ("x", "live")

    def set_tensor_address(self, name: str, address: int) -> bool:
        with self._alone():
            self.addresses[name] = address
            return name in ("x", "live", "y") and address % ALIGNMENT == 0 and name not in self.engine.refused

    def infer_shapes(self) -> list[str]:
        return [name for name in ("x", "live") if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        if self.engine.scratch_error is not None:
            self.engine.report(self.engine.scratch_error)
            return 0
        return self.engine.scratch_a_row * self.shapes["x"][0]

    def set_device_memory(self, address: int, size: int) -> None:
        with self._alone():
            least = self.engine.device_memory_size_v2 if self.engine.strict else 0
            if size < max(least, self.update_device_memory_size_for_shapes()) or address % ALIGNMENT:
                self.engine.report(f"device memory of {size} bytes is too small, or not aligned")
                return
            self.scratch.append((address, size))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, handle: int) -> bool:
        with self._alone():
            if self.engine.in_execute is not None:
                self.engine.in_execute()
            if self.engine.execute_error is not None:
                self.engine.report(self.engine.execute_error)
                return False
            assert handle, "on the default stream TensorRT synchronises the whole device"
            stream = self.engine.stream(handle)
            assert self._in_flight in (None, stream) or not self._in_flight.pending, "a call is still in flight"
            self._in_flight = stream
            self.streams.append(handle)
            stream.enqueue(self._kernel(stream.capturing is not None))
            return True

    def _kernel(self, belongs_to_a_graph: bool) -> Callable[[], None]:
        rows, columns = self.shapes["x"]
        array = ctypes.c_float * (rows * columns)
        x, y = (array.from_address(self.addresses[name]) for name in "xy")
        live = (ctypes.c_float * 1).from_address(self.addresses["live"])
        state = self.state

        def kernel() -> None:
            # A graph reads the state of the context at the time of its capture, so a later change invalidates the
            # graph.
            spoilt = belongs_to_a_graph and self.state != state
            y[:] = [float("nan") if spoilt else 2 * value + live[0] for value in x]

        return kernel


class Engine:
    """An engine. Its attributes determine which calls fail."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.streams: list[Stream] = []
        self.logger: Any = None
        self.device_memory_size_v2 = 4096
        self.scratch_a_row = 16
        self.strict = False
        self.refused: set[str] = set()
        self.scratch_error: str | None = None
        self.execute_error: str | None = None
        self.context_error: str | None = None
        self.in_execute: Callable[[], None] | None = None

    def create_execution_context(self, how: Any) -> Context | None:
        if self.context_error is not None:
            self.report(self.context_error)
            return None
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT")

    def report(self, text: str) -> None:
        self.logger.log(Severity.ERROR, text)

    def stream(self, handle: int) -> Stream:
        return next(stream for stream in self.streams if stream.cuda_stream == handle)

    @property
    def launches(self) -> int:
        """Return the number of launches of all contexts, including those during captures."""
        return sum(len(context.streams) for context in self.contexts)


class TensorRT:
    """The functions of the module that a runner uses.

    The only engine is `engine`, and the only valid plan is `b"plan"`.
    """

    __name__ = "tensorrt"
    ILogger = type("ILogger", (), {"ERROR": Severity.ERROR, "WARNING": Severity.WARNING, "__init__": lambda self: None})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    def __init__(self) -> None:
        self.engine = Engine()
        self.load_error: str | None = None

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self, logger)


class _Runtime:
    def __init__(self, trt: TensorRT, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self._trt.engine.logger = self._logger
        if self._trt.load_error is not None:
            self._trt.engine.report(self._trt.load_error)
        return self._trt.engine if plan == b"plan" and self._trt.load_error is None else None


class Compiled:
    """TensorRT-RTX's runtime cache: one line per compiled shape. A cache of another GPU is refused."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lines: list[bytes] = []

    def deserialize(self, content: bytes) -> bool:
        first, *lines = content.split(b"\n")
        accepted = first == b"this GPU"
        self.lines = lines if accepted else []
        return accepted

    def serialize(self) -> bytes:
        shapes = {context.shapes["x"] for context in self.engine.contexts if context.shapes}
        self.lines += [line for shape in sorted(shapes) if (line := repr(shape).encode()) not in self.lines]
        return b"\n".join([b"this GPU", *self.lines])


class TensorRTRTX(TensorRT):
    """TensorRT-RTX, which also compiles when it runs, and can store the result."""

    __name__ = "tensorrt_rtx"
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[Compiled] = []
        self.engine.create_runtime_config = self._new_config  # type: ignore[attr-defined]

    def _new_config(self) -> SimpleNamespace:
        def create() -> Compiled:
            self.caches.append(Compiled(self.engine))
            return self.caches[-1]

        return SimpleNamespace(
            create_runtime_cache=create,
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=lambda strategy: None,
        )


_Module = TypeVar("_Module", bound=TensorRT)


def install(monkeypatch: pytest.MonkeyPatch, trt: _Module) -> _Module:
    """Replace torch's CUDA functions by the mocks, for runners of the engine of `trt`; return `trt`."""

    def new_stream(device: object) -> Stream:
        trt.engine.streams.append(Stream(device))
        return trt.engine.streams[-1]

    Graph.captured = 0
    monkeypatch.setattr(execution, "_ALIGNMENT", ALIGNMENT)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    return trt
