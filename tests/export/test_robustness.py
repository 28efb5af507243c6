"""Exports that are killed, simultaneous, refused, or out of disk space: the store never has an invalid engine."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from forked import fork_server

from frostline.errors import EngineError, EngineMemoryError, ParityError, ShapeError
from frostline.export import exporter
from frostline.export.exporter import Exported, build_stage, ensure_verified, export_stage
from frostline.export.model import load_staged_model
from frostline.export.recipe import Recipe
from frostline.runtime.backends import get_backend
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Stage

KILLS = 20

pytestmark = pytest.mark.timeout(600)


def load_stage() -> Stage:
    return load_staged_model(Recipe(model="tiny"), "cpu").stages["text_encoder"]


@pytest.fixture(scope="module")
def stage() -> Stage:
    return load_stage()


def export(stage: Stage, root: Path, force: bool = False) -> Exported:
    return export_stage(stage, "onnxruntime", EngineStore(root), force=force)


def assert_sound(root: Path) -> None:
    """Check that every listed engine is intact, and is only marked as verified if its measurements passed."""
    store = EngineStore(root)
    for record in store.find():
        manifest = store.verify(record).manifest
        assert manifest == record.manifest
        assert manifest.verified == bool(manifest.parity)
        assert all(parity.passed for parity in manifest.parity)


def assert_nothing_but_the_engine(root: Path) -> None:
    store = EngineStore(root)
    (record,) = store.find()
    assert {entry.name for entry in record.path.parent.iterdir()} == {record.path.name, f".{record.path.name}.lock"}
    assert {entry.name for entry in record.path.iterdir()} == {"manifest.json", "text_encoder.onnx"}


@dataclass(frozen=True)
class Death:
    """How a child ended: whether a signal killed it before it finished, and its lifetime in seconds."""

    killed: bool
    seconds: float


class Nursery:
    """A process that has imported and loaded everything, and forks children that export.

    It is not this process, because OpenMP threads of this process would deadlock a forked child.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        server = fork_server()
        self._connection, theirs = server.Pipe()
        self._process = server.Process(target=_serve, args=(theirs, scratch, dict(os.environ)))
        self._process.start()
        theirs.close()
        # The nursery answers when the engine in its scratch folder is built.
        self.ask(bool)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._connection.send((function, arguments))
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("first"))
    yield nursery
    nursery.close()


def _serve(connection: Connection, scratch: Path, environment: dict[str, str]) -> None:
    """Answer requests in the nursery process until the other end closes the connection."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)  # a thread pool in this process would deadlock its children, too
    exporter._LATENCY_SECONDS = 0.2  # as in all tests; this process has no fixtures
    stage = load_stage()
    export(stage, scratch)  # the first export imports what the others need
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(stage, *arguments))
        except Exception as error:
            connection.send(error)


def exported_and_killed(stage: Stage, roots: Sequence[Path], moments: Sequence[float | None]) -> list[Death]:
    """Export into each root in a child process, and kill the children at their `moments` (seconds).

    Runs in the nursery. Existing engines are replaced; None lets a child finish.
    """
    fork = multiprocessing.get_context("fork")
    start = time.monotonic()
    children = [fork.Process(target=export, args=(stage, root, True)) for root in roots]
    for child in children:
        child.start()
    deaths = []
    for child, moment in zip(children, moments, strict=True):
        child.join(None if moment is None else max(0.0, start + moment - time.monotonic()))
        if child.exitcode is None:
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
        deaths.append(Death(child.exitcode != 0, time.monotonic() - start))
    return deaths


def exported_at_once(stage: Stage, root: Path, processes: int) -> list[tuple[bool, bool]]:
    """Export at the same time in several children; return whether each built an engine, and whether it is verified.

    Runs in the nursery.
    """
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(processes), fork.SimpleQueue()

    def run() -> None:
        barrier.wait()
        exported = export(stage, root)
        results.put((exported.built, exported.manifest.verified))

    children = [fork.Process(target=run) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [results.get() for _ in children]


def test_killed_at_any_moment(nursery: Nursery, stage: Stage, tmp_path: Path) -> None:
    """Kill two exports at a time, each in its own store, which contains what the previous export left there."""
    roots = [tmp_path / "a", tmp_path / "b"]
    whole = nursery.ask(exported_and_killed, roots, [None, None])
    assert not any(death.killed for death in whole)
    folders = []
    for root in roots:
        assert_nothing_but_the_engine(root)
        (record,) = EngineStore(root).find()
        EngineStore(root).remove(record)
        folders.append(record.path.parent)

    seconds, generator = min(death.seconds for death in whole), random.Random(0)
    fractions = [(index + generator.random()) / KILLS for index in range(KILLS)]
    killed = debris = 0
    for pair in zip(fractions[::2], fractions[1::2], strict=True):
        deaths = nursery.ask(exported_and_killed, roots, [seconds * fraction for fraction in pair])
        # If the machine is less busy than at first, an export takes less time.
        seconds = min([seconds, *(death.seconds for death in deaths if not death.killed)])
        killed += sum(death.killed for death in deaths)
        debris += sum(any(entry.suffix == ".building" for entry in folder.iterdir()) for folder in folders)
        for root in roots:
            assert_sound(root)
    assert killed >= KILLS // 4, "too few children were killed before they finished"
    assert debris >= 2, "too few children were killed in the middle of a build"

    exported = export(stage, roots[0], force=True)
    assert exported.built
    assert exported.manifest.verified
    assert_sound(roots[0])
    assert_nothing_but_the_engine(roots[0])


def test_of_several_at_once_one_builds(nursery: Nursery, tmp_path: Path) -> None:
    outcomes = nursery.ask(exported_at_once, tmp_path, 2)
    assert sorted(built for built, _ in outcomes) == [False, True]
    assert all(verified for _, verified in outcomes)
    assert_sound(tmp_path)
    assert_nothing_but_the_engine(tmp_path)


def test_an_engine_that_differs_is_deleted(stage: Stage, tmp_path: Path) -> None:
    unreachable = Tolerance(atol=0.0, rtol=0.0, cosine=2.0)
    with pytest.raises(ParityError, match=r"context of text_encoder \(\w+\) by \d.*cosine 2\. .*deleted"):
        export(replace(stage, tolerance=unreachable), tmp_path)
    assert EngineStore(tmp_path).find() == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    exported = export(stage, tmp_path)
    assert exported.built
    assert exported.manifest.verified


def refuse_to_load(patch: pytest.MonkeyPatch, error: EngineError) -> None:
    def load(*_: object) -> None:
        raise error

    patch.setattr(get_backend("onnxruntime"), "load", load)


def test_an_engine_that_does_not_load_is_deleted(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "the onnxruntime engine of text_encoder does not run: no kernel for Gelu. The engine was deleted."
    with monkeypatch.context() as patch:
        refuse_to_load(patch, EngineError("no kernel for Gelu"))
        with pytest.raises(EngineError) as caught:
            export(stage, tmp_path)
        assert str(caught.value) == said
        assert EngineStore(tmp_path).find() == []

        build_stage(stage, "onnxruntime", EngineStore(tmp_path))
        assert ensure_verified([stage], EngineStore(tmp_path)) == []
        assert said in caplog.messages
        assert EngineStore(tmp_path).find() == []
    assert export(stage, tmp_path).manifest.verified


@pytest.mark.parametrize(
    "error",
    [
        EngineMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ShapeError("lora has shape (64, 8), engines support (1, 8) to (32, 8)"),
    ],
    ids=str,
)
def test_an_engine_is_kept_where_the_fault_is_not_its_own(
    error: EngineError, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_to_load(patch, error)
        with pytest.raises(type(error)) as caught:
            export(stage, tmp_path)
        assert caught.value is error
    exported = export(stage, tmp_path)
    assert not exported.built
    assert exported.manifest.verified


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_said_and_leaves_nothing_half(nursery: Nursery, stage: Stage, tmp_path: Path) -> None:
    """Fill disks of different sizes, at different steps: the folder, the graph, the manifest, the measurements."""
    (record,) = EngineStore(nursery.scratch).find()
    page = os.sysconf("SC_PAGE_SIZE")
    model = -(-(record.path / "text_encoder.onnx").stat().st_size // page) * page
    sizes = ["nr_inodes=3", f"size={model // 2}", f"size={model}", f"size={model + page}"]
    listed = []
    for number, options in enumerate(sizes):
        with small_disk(tmp_path / f"disk{number}", options) as root:
            with pytest.raises(EngineError, match=r"the disk is full\. Free some space"):
                export(stage, root)
            assert_sound(root)
            listed.append(len(EngineStore(root).find()))
            if listed[-1] == 0:
                files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
                assert files == [], options
    assert listed == [0, 0, 0, 1]


def test_what_a_backend_does_not_compute_in_is_refused_before_tracing(tmp_path: Path) -> None:
    recipe = Recipe(model="tiny", stages=("text_encoder",), precision="bf16", lora=None)
    stage = load_staged_model(recipe, "cpu").stages["text_encoder"]
    with pytest.raises(EngineError, match="onnxruntime does not support bf16: export text_encoder in fp16 or fp32, or"):
        export_stage(stage, "onnxruntime", EngineStore(tmp_path))
    assert list(tmp_path.iterdir()) == []
