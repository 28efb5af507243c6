"""Building of plans with a mock of TensorRT: settings, timing cache, memory, and exceptions in callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from frostline.errors import EngineError, EngineMemoryError
from frostline.runtime.backends.tensorrt.builder import PlanBuilder
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


class Severity(IntEnum):
    ERROR = 1
    WARNING = 2
    VERBOSE = 4


class Base:
    def __init__(self) -> None: ...


class Config:
    """A builder's configuration. It refuses a timing cache that does not start with `mine`."""

    def __init__(self) -> None:
        self.features: dict[object, bool] = {}
        self.profiles = 0
        self.progress_monitor: Any = None
        self.cache: bytes | None = None

    def clear_flag(self, flag: object) -> None: ...

    def set_preview_feature(self, feature: object, enable: bool) -> None:
        self.features[feature] = enable

    def add_optimization_profile(self, profile: object) -> int:
        self.profiles += 1
        return self.profiles - 1

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if cache.startswith(b"mine") or not cache else b""
        return self.cache == cache

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"mine, and what this build measured")


class TensorRT:
    """The functions of the module that building uses.

    Attributes:
        steps: functions that a build calls with this object.
    """

    __name__ = "tensorrt"
    ILogger = type("ILogger", (Base,), {"ERROR": Severity.ERROR, "WARNING": Severity.WARNING})
    IProgressMonitor = Base
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    PreviewFeature = SimpleNamespace(RUNTIME_ACTIVATION_RESIZE_10_10="resize")

    def __init__(self, *steps: Callable[[TensorRT], object]) -> None:
        self.config = Config()
        self.steps = steps
        self.logger: Any = None
        self.failed = False
        self.goes_on: list[bool] = []

    def Builder(self, logger: Any) -> Any:
        self.logger = logger
        return _Builder(self)

    def OnnxParser(self, graph: Any, logger: Any) -> SimpleNamespace:
        return SimpleNamespace(parse_from_file=lambda path: True)

    def fail(self, text: str) -> None:
        self.logger.log(Severity.ERROR, text)
        self.failed = True


class _Builder:
    def __init__(self, trt: TensorRT) -> None:
        self._trt = trt

    def create_network(self, flags: int) -> SimpleNamespace:
        entry = SimpleNamespace(name="x", shape=(-1, 4))
        return SimpleNamespace(num_layers=0, num_inputs=1, get_input=lambda index: entry)

    def create_builder_config(self) -> Config:
        return self._trt.config

    def create_optimization_profile(self) -> SimpleNamespace:
        return SimpleNamespace(set_shape=lambda name, low, usual, high: None)

    def build_serialized_network(self, graph: object, config: Config) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, len(self._trt.steps))
        for index, step in enumerate(self._trt.steps):
            step(self._trt)
            self._trt.goes_on.append(monitor.step_complete("Building", index))
            if not self._trt.goes_on[-1]:
                return None
        monitor.phase_finish("Building")
        return None if self._trt.failed else b"plan"


@pytest.fixture
def network() -> Network:
    return Network("n", nn.Linear(4, 4), (TensorSpec("x", (Dimension("rows", 1, 2, 8), 4)),), ("y",))


def build(trt: TensorRT, network: Network, timing_cache: Path | None = None, progress: Any = None) -> Any:
    return PlanBuilder(trt, (), timing_cache).build(network, Path("n.onnx"), progress)


def nothing(trt: TensorRT) -> None:
    """Do nothing in this step."""


def test_scratch_memory_is_to_follow_the_shapes(network: Network) -> None:
    trt = TensorRT(nothing)
    assert build(trt, network) == b"plan"
    assert trt.config.features == {"resize": True}
    older = TensorRT(nothing)
    older.PreviewFeature = SimpleNamespace()
    assert build(older, network) == b"plan"


def test_a_timing_cache_grows(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    build(TensorRT(nothing), network, path)
    assert path.read_bytes() == b"mine, and what this build measured"
    path.write_bytes(b"mine, of an earlier build")
    build(trt := TensorRT(nothing), network, path)
    assert trt.config.cache == b"mine, of an earlier build"
    assert path.read_bytes() == b"mine, and what this build measured"


def test_a_timing_cache_of_another_gpu_is_left_as_it_is(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"of another GPU")
    assert build(TensorRT(nothing), network, path) == b"plan"
    assert path.read_bytes() == b"of another GPU"
    assert "is from another GPU or version: it is neither used nor changed" in caplog.text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Error Code 5: (allocation of 8 bytes)", EngineMemoryError),
        ("Error Code 2: OutOfMemory (no further information)", EngineMemoryError),
        ("Could not find any implementation for node Conv_1", EngineError),
    ],
)
def test_why_a_build_fails_is_told(text: str, kind: type[EngineError], network: Network) -> None:
    with pytest.raises(EngineError, match=f"tensorrt cannot build n: {text[:14]}") as caught:
        build(TensorRT(lambda trt: trt.fail(text)), network)
    assert type(caught.value) is kind


class Interrupting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise KeyboardInterrupt(record.getMessage())


def test_what_a_log_handler_raises_ends_the_build_and_is_not_lost(network: Network) -> None:
    trt = TensorRT(nothing, lambda trt: trt.logger.log(Severity.VERBOSE, "tactic 7"), nothing, nothing)
    logger = logging.getLogger("frostline.runtime.backends.tensorrt.messages")
    handler, level = Interrupting(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt, match="VERBOSE: tactic 7"):
            build(trt, network)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert trt.goes_on == [True, False]


def test_what_a_phase_raises_ends_the_build_and_is_not_lost(network: Network) -> None:
    """Use a phase with an invalid name as an example of an error in the progress monitor."""
    trt = TensorRT(lambda trt: trt.config.progress_monitor.phase_start([], None, 1), nothing)
    with pytest.raises(TypeError, match="unhashable"):
        build(trt, network)
    assert trt.goes_on == [False]


def test_what_progress_raises_cancels_the_build(network: Network) -> None:
    def interrupted(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    def wait_for_the_end(trt: TensorRT) -> None:
        while trt.config.progress_monitor.step_complete("Building", 0):
            pass

    trt = TensorRT(nothing, wait_for_the_end)
    with pytest.raises(KeyboardInterrupt):
        build(trt, network, progress=interrupted)
    assert trt.goes_on == [True, False]


def test_progress_is_told_in_the_callers_thread(network: Network) -> None:
    told = []
    build(TensorRT(nothing, nothing), network, progress=lambda *step: told.append(step))
    assert told == [("Building", 1, 2), ("Building", 2, 2)]
