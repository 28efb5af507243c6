"""The TensorRT runner with mocks of the GPU: what it binds, allocates, captures and replays, in several threads."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_standin import Graph, Severity, TensorRT, current, install, on_stream
from torch import Tensor, nn

from frostline.errors import EngineError, EngineMemoryError
from frostline.runtime.backends.tensorrt.runner import TensorRTRunner
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec

CPU = torch.device("cpu")
# Messages of TensorRT's allocator, of its execution context and of CUDA, and its error code for allocations.
OUT_OF_MEMORY = [
    "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
    "[executionContext.cpp::ExecutionContext::470] Error Code 2: OutOfMemory (no further information)",
    "Error Code 1: Cuda Runtime (In catchCudaError (cudaError 2: out of memory))",
    "Error Code 5: (allocation of 8 bytes)",
]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    return install(monkeypatch, TensorRT())


@pytest.fixture
def doubled() -> Network:
    """Return the network that the mock computes: y = 2 x + live."""
    x = TensorSpec("x", (Dimension("n", 1, 2, 64), 4))
    return Network("n", nn.Linear(4, 4), (x,), ("y",), {"live": torch.ones(1)}, (TensorSpec("live", (1,)),))


@pytest.fixture
def runner(trt: TensorRT, doubled: Network) -> TensorRTRunner:
    return TensorRTRunner(trt, b"plan", doubled, CPU)


def assert_right(runner: TensorRTRunner, values: Tensor, live: float = 1) -> Tensor:
    output = runner(x=values)["y"]
    torch.testing.assert_close(output, 2 * values + live)
    return output


def test_the_runner_binds_addresses_and_allocates_outputs(
    trt: TensorRT, doubled: Network, runner: TensorRTRunner
) -> None:
    values = torch.randn(4, 3).t()
    assert not values.is_contiguous()
    first = assert_right(runner, values)
    (context,) = trt.engine.contexts
    assert context.addresses == {
        "x": context.addresses["x"],
        "live": doubled.live["live"].data_ptr(),
        "y": first.data_ptr(),
    }
    assert [size for _, size in context.scratch] == [3 * 16]
    with pytest.raises(EngineError, match="engine supports"):
        runner(x=torch.zeros(65, 4))
    with pytest.raises(EngineError, match="TensorRT cannot load n: no reason given"):
        TensorRTRunner(trt, b"other", doubled, CPU)


def test_from_the_second_call_of_a_shape_on_a_cuda_graph_is_replayed(
    trt: TensorRT, doubled: Network, runner: TensorRTRunner
) -> None:
    live = doubled.live["live"]
    outputs = []
    for call in range(4):
        live.fill_(call)
        values = torch.randn(4, 3).t()
        outputs.append((runner(x=values)["y"], 2 * values + call))
    # One launch in the first call; in the second, one launch before the capture and one in it. Replays launch nothing.
    assert trt.engine.launches == 3
    for actual, expected in outputs:
        torch.testing.assert_close(actual, expected)
    assert_right(runner, torch.randn(2, 4), 3)
    assert trt.engine.launches == 4
    # If the live tensor has moved, the captured graph is not used.
    doubled.live["live"] = moved = torch.full((1,), 9.0)
    assert_right(runner, values, 9)
    moved.fill_(8)
    assert_right(runner, values, 8)


def test_a_recording_stays_right_when_other_shapes_come(trt: TensorRT, runner: TensorRTRunner) -> None:
    """Use a separate execution context for each graph, because a launch at another shape changes a context's state."""
    shapes = [3, 5, 7]
    for _ in range(2):
        for rows in shapes:
            assert_right(runner, torch.randn(rows, 4))
    assert Graph.captured == 3
    for rows in (*shapes, 11, *reversed(shapes)):
        assert_right(runner, torch.randn(rows, 4))
    assert Graph.captured == 3
    # One context for launches, and one for each graph.
    assert len(trt.engine.contexts) == 4


def test_more_shapes_than_recordings_do_not_drive_out_each_other(trt: TensorRT, runner: TensorRTRunner) -> None:
    for _ in range(8):
        for rows in range(1, 7):
            assert_right(runner, torch.randn(rows, 4))
    assert Graph.captured == 4
    # The first four shapes are replayed, the other two launched.
    launches = trt.engine.launches
    for rows in range(1, 7):
        assert_right(runner, torch.randn(rows, 4))
    assert trt.engine.launches == launches + 2


def test_a_recording_that_is_used_no_more_gives_way(runner: TensorRTRunner) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 8):
        for _ in range(3):
            assert_right(runner, torch.randn(rows, 4))
    assert Graph.captured == 8


def test_what_was_dropped_twice_is_not_recorded_again(trt: TensorRT, runner: TensorRTRunner) -> None:
    def use(*shapes: int) -> int:
        before = Graph.captured
        for rows in shapes:
            for _ in range(2):
                assert_right(runner, torch.randn(rows, 4))
        return Graph.captured - before

    assert use(1, 2, 3, 4) == 4
    assert use(5, 6, 7, 8) == 4, "graphs 1 to 4 are dropped"
    assert use(1, 2, 3, 4) == 4
    assert use(5, 6, 7, 8) == 4, "graphs 1 to 4 are dropped for the second time"
    assert use(1, 2, 3, 4) == 0
    assert use(9) == 1, "other shapes are still captured"


def test_what_cannot_be_recorded_is_launched(
    trt: TensorRT, runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def refuse(graph: Graph, **_: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for _ in range(4):
        assert_right(runner, torch.randn(3, 4))
    assert [record.message for record in caplog.records] == [
        "cannot record CUDA graphs; each kernel is launched separately in every call: "
        "operation not permitted when stream is capturing"
    ]


def test_a_recording_that_lacks_memory_is_no_reason_to_record_no_other(
    runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def no_memory(graph: Graph, **_: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", no_memory)
        for _ in range(4):
            assert_right(runner, torch.randn(3, 4))
    assert caplog.text.count("cannot record a CUDA graph at these shapes") == 1
    for _ in range(2):
        assert_right(runner, torch.randn(5, 4))
    assert Graph.captured == 1


def test_scratch_memory_is_what_the_shapes_need(trt: TensorRT, runner: TensorRTRunner) -> None:
    assert_right(runner, torch.randn(2, 4))
    assert_right(runner, torch.randn(8, 4))
    assert [size for _, size in trt.engine.contexts[0].scratch] == [2 * 16, 8 * 16]


def test_an_engine_that_wants_the_documented_size_gets_it(trt: TensorRT, runner: TensorRTRunner) -> None:
    trt.engine.strict = True
    assert_right(runner, torch.randn(2, 4))
    assert [size for _, size in trt.engine.contexts[0].scratch] == [4096]


def test_no_scratch_memory_is_a_size_and_a_failure_is_not(trt: TensorRT, runner: TensorRTRunner) -> None:
    trt.engine.scratch_a_row = 0
    assert_right(runner, torch.randn(2, 4))
    assert trt.engine.contexts[0].scratch == [(0, 0)]
    trt.engine.scratch_error = "not all shapes are specified"
    with pytest.raises(EngineError, match="cannot compute how much memory it needs: not all shapes are specified"):
        runner(x=torch.randn(2, 4))


def test_an_address_that_is_refused_is_an_error(trt: TensorRT, runner: TensorRTRunner) -> None:
    trt.engine.refused = {"live"}
    with pytest.raises(EngineError, match="n: TensorRT rejects the address of live"):
        runner(x=torch.randn(2, 4))


def test_what_is_not_aligned_is_copied(trt: TensorRT, doubled: Network) -> None:
    doubled.live["live"] = live = torch.ones(9)[1:2]
    assert live.is_contiguous()
    assert live.data_ptr() % 64
    runner = TensorRTRunner(trt, b"plan", doubled, CPU)
    for value in range(4):
        live.fill_(value)
        assert_right(runner, torch.randn(9, 4)[1:], value)
    # A captured graph would always use the same copy of the live tensor.
    assert Graph.captured == 0


def test_it_waits_for_the_caller_and_the_caller_for_it(trt: TensorRT, runner: TensorRTRunner) -> None:
    """Wait for inputs that are still being computed when the engine is called; each call uses another stream."""
    for call in range(4):
        source, side = torch.randn(3, 4), torch.cuda.Stream(CPU)
        with on_stream(side):
            late = torch.zeros(3, 4).copy_(source)
            assert not late.any(), "the copy must still be pending"
            result = torch.zeros(3, 4).copy_(runner(x=late)["y"])
        current().wait_stream(side)
        torch.testing.assert_close(result, 2 * source + 1, msg=f"call {call}")
    assert Graph.captured == 1
    own = trt.engine.streams[0].cuda_stream
    assert {handle for context in trt.engine.contexts for handle in context.streams} == {own}


def test_several_threads_at_different_shapes(trt: TensorRT, runner: TensorRTRunner) -> None:
    barrier, failures = threading.Barrier(4), list[BaseException]()

    def call(rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        try:
            barrier.wait()
            for _ in range(100):
                assert_right(runner, torch.randn(rows, 4, generator=generator))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(rows,)) for rows in (2, 5, 11, 23)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert Graph.captured == 4


@pytest.mark.parametrize("reported", OUT_OF_MEMORY, ids=lambda reported: reported[:40])
def test_memory_that_is_not_there_is_no_fault_of_the_engine(
    reported: str, trt: TensorRT, doubled: Network, runner: TensorRTRunner
) -> None:
    trt.engine.execute_error = reported
    with pytest.raises(EngineMemoryError, match="TensorRT failed on n: "):
        runner(x=torch.randn(2, 4))
    trt.engine.execute_error = "an illegal memory access was encountered"
    with pytest.raises(EngineError, match="illegal memory access") as caught:
        runner(x=torch.randn(2, 4))
    assert not isinstance(caught.value, EngineMemoryError)
    trt.engine.context_error = reported
    with pytest.raises(EngineMemoryError, match="TensorRT cannot prepare n: "):
        TensorRTRunner(trt, b"plan", doubled, CPU)
    trt.load_error = reported
    with pytest.raises(EngineMemoryError, match="TensorRT cannot load n: "):
        TensorRTRunner(trt, b"plan", doubled, CPU)


def test_torch_may_lack_the_memory_for_scratch(runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    values, empty = torch.randn(2, 4), torch.empty

    def no_memory(shape: Any, *rest: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return empty(shape, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        with pytest.raises(EngineMemoryError, match="TensorRT failed on n: CUDA out of memory"):
            runner(x=values)
    assert_right(runner, values)


def test_what_a_callback_raises_crosses_no_native_code_and_is_not_lost(trt: TensorRT, runner: TensorRTRunner) -> None:
    """Raise like Ctrl-C while TensorRT logs."""

    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    told = list[str]()

    def log_something() -> None:
        trt.engine.logger.log(Severity.VERBOSE, "kernel selected")
        told.append("the callback returned")

    trt.engine.in_execute = log_something
    logger = logging.getLogger("frostline.runtime.backends.tensorrt.messages")
    handler, level = Interrupting(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner(x=torch.randn(2, 4))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert told == ["the callback returned"]
    assert_right(runner, torch.randn(2, 4))
