"""`auto` at each shape: what is measured, what is stored, and what makes it measure again."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.export.exporter import export_stage
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.planning import autotune as latency
from frostline.runtime.planning import choosing
from frostline.runtime.planning import trials as trials_file
from frostline.runtime.planning.autotune import LatencyNote, machine_id, shape_class, take_turns
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, TensorSpec

ORT = "onnxruntime"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def signing_key(session_signing_key: Path) -> Path:
    """Use one key for all tests, because the engines are used by several tests."""
    return session_signing_key


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder for the stored latencies."""
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path))
    return tmp_path / "latency"


@pytest.fixture(scope="module")
def stage() -> Stage:
    """Return a stage that computes `y = 2 x` for x of 1 to 64 rows."""

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.two

    network = Network("double", Double(), (TensorSpec("x", (Dimension("rows", 1, 4, 64), 3)),), ("y",))
    tolerance = Tolerance(atol=1e-6, rtol=0, cosine=0.999)
    return Stage(name="double", model="toy", networks=(network,), tolerance=tolerance)


@pytest.fixture(scope="module")
def engines(stage: Stage, tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> Path:
    """Return a store with an engine that was twice as fast as torch when it was verified."""
    root = tmp_path_factory.mktemp("engines")
    store = EngineStore(root)
    exported = export_stage(stage, ORT, store).manifest
    record = store.get(exported.id)
    assert record is not None
    store.update(store.verify(record), exported.updated(latency_ms={"torch": 2.0, ORT: 1.0}))
    return root


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Return a list that gets rows and contenders of every measurement; the engine is faster from 8 rows on."""
    seen = []

    def measured(runs_of: Mapping[str, Any], *_: float) -> dict[str, float]:
        rows = len(runs_of["torch"].args[0]["x"])
        seen.append((rows, tuple(runs_of)))
        return {name: 1.0 if (name == ORT) == (rows >= 8) else 2.0 for name in runs_of}

    monkeypatch.setattr(trials_file, "take_turns", measured)
    return seen


def run(auto: Runtime, rows: int) -> str:
    """Run the stage with this number of rows; return the backend that was used."""
    x = torch.ones(rows, 3)
    with auto.clock.collect() as times:
        assert torch.equal(auto["double"](x=x)["y"], 2 * x)
    (served,) = times.read().values()
    assert auto.plan["double"].backend == served.backend
    return served.backend


def test_every_shape_is_measured_once_and_served_by_the_fastest(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]]
) -> None:
    auto = Runtime({"double": stage}, "auto", engines)
    prints = {auto.fingerprint("double")}
    assert [run(auto, rows) for rows in (2, 8, 2, 8, 7)] == ["torch", ORT, "torch", ORT, ORT]
    assert trials == [(2, ("torch", ORT)), (8, ("torch", ORT))]
    assert auto.plan["double"].reason == "2.00x as fast as torch at this shape"
    run(auto, 2)
    assert auto.plan["double"].reason == "onnxruntime is slower at this shape (0.50x)"
    # Cached outputs stay valid, because every candidate has passed parity.
    assert prints == {auto.fingerprint("double")}


@pytest.mark.parametrize(("torch_ms", "served"), [(1.04, "torch"), (1.06, ORT)])
def test_an_engine_that_gains_hardly_anything_leaves_the_stage_to_torch(
    torch_ms: float, served: str, stage: Stage, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_file, "take_turns", lambda runs_of, *_: {ORT: 1.0, "torch": torch_ms})
    assert run(Runtime({"double": stage}, "auto", engines), 8) == served


def test_the_next_run_remembers(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]], notes: Path
) -> None:
    run(Runtime({"double": stage}, "auto", engines), 8)
    assert run(Runtime({"double": stage}, "auto", engines), 8) == ORT
    assert len(trials) == 1
    (note,) = notes.iterdir()
    signed = note.read_text()
    for altered in ("{", signed.replace("1.0", "9.0"), signed.splitlines()[0]):
        note.write_text(altered)
        trials.clear()
        assert run(Runtime({"double": stage}, "auto", engines), 8) == ORT
        assert len(trials) == 1
        assert note.read_text() == signed
    assert json.loads(signed.splitlines()[0]) == {"torch": 2.0, ORT: 1.0}


def test_another_machine_measures_anew(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Runtime({"double": stage}, "auto", engines).plan["double"].reason == "2.00x as fast as torch"
    run(Runtime({"double": stage}, "auto", engines), 8)
    machine_id_here = machine_id(CPU)
    for module in (latency, choosing):
        monkeypatch.setattr(module, "machine_id", lambda device: "another CPU")
    auto = Runtime({"double": stage}, "auto", engines)
    assert auto.plan["double"].reason == f"as measured on {machine_id_here}; timed on this machine at first use"
    assert auto.plan["double"].backend == ORT
    assert not auto.plan["double"].latency_ms
    assert run(auto, 8) == ORT
    assert len(trials) == 2


def test_threads_and_how_they_wait_are_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    seen = [machine_id(CPU)]
    monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
    seen.append(machine_id(CPU))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    seen.append(machine_id(CPU))
    assert len({*seen}) == 3
    assert f"{os.cpu_count()} cores" in seen[0]


def test_a_backend_that_was_asked_for_is_not_questioned(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]]
) -> None:
    assert run(Runtime({"double": stage}, ORT, engines), 2) == ORT
    auto = Runtime({"double": stage}, "auto", engines)
    with auto.use(double=ORT):
        assert run(auto, 2) == ORT
    with auto.use(double="torch"):
        assert run(auto, 8) == "torch"
    assert trials == []


def test_several_processes_keep_to_the_plan(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither measure nor choose in one process: a sharded stage runs in all processes at once."""
    run(Runtime({"double": stage}, "auto", engines), 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert [run(Runtime({"double": stage}, "auto", engines), rows) for rows in (2, 3)] == [ORT, ORT]
    assert len(trials) == 1


def test_a_shape_that_no_engine_serves_goes_to_torch_with_one_warning(
    stage: Stage, engines: Path, trials: list[tuple[int, tuple[str, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    auto = Runtime({"double": stage}, "auto", engines)
    assert [run(auto, rows) for rows in (65, 66, 8)] == ["torch", "torch", ORT]
    assert [r.getMessage()[:49] for r in caplog.records if r.levelno == logging.WARNING] == [
        "stage double: using torch for this shape (network"
    ]


def test_an_engine_that_fails_its_trial_costs_one_warning(
    stage: Stage,
    engines: Path,
    trials: list[tuple[int, tuple[str, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(self: OnnxRuntimeRunner, **inputs: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", broken)
    auto = Runtime({"double": stage}, "auto", engines)
    assert [run(auto, rows) for rows in (8, 16)] == ["torch", "torch"]
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message == "stage double: backend onnxruntime failed, using torch from now on (out of memory)"
    assert trials == []


def test_whoever_notes_first_is_believed(notes: Path) -> None:
    note = LatencyNote("double", {ORT: "key", "torch": "torch"}, "x:8x3", CPU)
    assert note.read() is None
    assert note.write({ORT: 1.0, "torch": 2.0}) == {ORT: 1.0, "torch": 2.0}
    again = LatencyNote("double", {ORT: "key", "torch": "torch"}, "x:8x3", CPU)
    assert again.write({ORT: 2.0, "torch": 1.0}) == {ORT: 1.0, "torch": 2.0}
    assert LatencyNote("double", {ORT: "another", "torch": "torch"}, "x:8x3", CPU).read() is None
    assert [path.suffix for path in notes.iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("extent", "rounded"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 24), (96, 96)],
)
def test_shapes_of_one_class(extent: int, rounded: int) -> None:
    assert shape_class({"b": torch.zeros(extent, 1), "a": torch.zeros(())}) == f"a: b:{rounded}x1"


def test_runners_take_turns() -> None:
    calls: list[str] = []

    def runner(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    times = take_turns({name: runner(name) for name in "ab"}, runs=2, seconds=60)
    assert calls == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}
    assert take_turns({"a": runner("a")}, runs=9, seconds=-1).keys() == {"a"}
    assert calls.count("a") == 3 + 2
