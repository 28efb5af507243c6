"""Several processes that use one store, and processes that are killed while they use it."""

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from frostline.runtime.engines import signing
from frostline.runtime.engines.manifest import EngineId, Manifest
from frostline.runtime.engines.store import EngineStore, VerifiedEngine

pytestmark = pytest.mark.fresh_process

ENGINE = EngineId("tiny", "vae_encoder", "onnxruntime", "0123456789abcdef")
CHANGES_ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

fork = multiprocessing.get_context("fork")  # the children share this test's functions and start immediately

BuildEngine = Callable[..., VerifiedEngine]


def killed_at(moment: int, root: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a process that is killed just before its `moment`-th change of the disk.

    Returns:
        False if the process finished before.
    """

    def die_in_time() -> None:
        steps = itertools.count()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in CHANGES_ON_DISK and str(root) in str(arguments[0]) and next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    process = fork.Process(target=die_in_time)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_sound(store: EngineStore, build: BuildEngine) -> None:
    """Check that listed engines are intact, and that the next build works and deletes what was left."""
    for record in store.find():
        store.verify(record)
    built = build()
    assert {entry.name for entry in built.path.parent.iterdir()} == {built.path.name, f".{built.path.name}.lock"}
    (record,) = store.find()
    assert store.verify(record) == built


def test_killed_at_any_moment_of_a_build(store: EngineStore, build: BuildEngine) -> None:
    signing.sign(b"")  # other tests check the creation of the key
    moment = 0
    while killed_at(moment, store.root, build):
        assert_sound(store, build)
        store.remove(store.find()[0])
        moment += 1
    assert moment > 10


def test_killed_at_any_moment_of_a_replacement(store: EngineStore, build: BuildEngine) -> None:
    build()
    moment = 0
    while killed_at(moment, store.root, build):
        assert_sound(store, build)
        moment += 1
    assert moment > 15


def test_killed_at_any_moment_of_an_update(store: EngineStore, build: BuildEngine) -> None:
    built = build()
    changed = built.manifest.updated(verified=True)
    (record,) = store.find()
    moment = 0
    while killed_at(moment, store.root, lambda: store.update(built, changed)):
        store.verify(record)
        moment += 1
    assert store.verify(record).manifest.verified
    assert_sound(store, build)


def test_killed_at_any_moment_of_a_removal(store: EngineStore, build: BuildEngine) -> None:
    build()
    (record,) = store.find()
    moment = 0
    while killed_at(moment, store.root, lambda: store.remove(record)):
        assert_sound(store, build)
        moment += 1
    assert store.find() == []


def test_a_builder_killed_while_writing_frees_its_lock(store: EngineStore, build: BuildEngine) -> None:
    started = fork.Event()

    def write_for_ever() -> None:
        with store.building(ENGINE) as building, (building.folder / "model.onnx").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
                started.set()
                time.sleep(0.01)

    process = fork.Process(target=write_for_ever)
    process.start()
    assert started.wait(30)
    process.kill()
    process.join()
    assert store.find() == []
    assert_sound(store, build)


def test_several_processes_build_one_key_once(store: EngineStore, manifest: Manifest) -> None:
    signing.sign(b"")
    barrier, results = fork.Barrier(3), fork.SimpleQueue()

    def build_or_wait() -> None:
        barrier.wait()
        with store.building(ENGINE) as building:
            engine = building.existing
            if engine is None:
                (building.folder / "model.plan").write_bytes(os.urandom(64))
                time.sleep(0.3)  # long enough that the other processes have to wait
                engine = building.commit(manifest.updated(networks=()))
        results.put((building.existing is None, engine.read("model.plan")))

    processes = [fork.Process(target=build_or_wait) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    outcomes = [results.get() for _ in processes]
    assert sum(built for built, _ in outcomes) == 1
    assert len({content for _, content in outcomes}) == 1


def test_readers_see_whole_engines_or_none(store: EngineStore, build: BuildEngine) -> None:
    build()
    stop = fork.Event()

    def replace_and_remove() -> None:
        while not stop.is_set():
            build()
            store.remove(store.find()[0])

    process = fork.Process(target=replace_and_remove)
    process.start()
    try:
        for _ in range(300):
            for record in store.find():
                assert record.manifest is not None, record.problem
    finally:
        stop.set()
        process.join()
    assert process.exitcode == 0


def test_concurrent_removal_is_no_error(store: EngineStore, build: BuildEngine) -> None:
    build()
    (record,) = store.find()
    processes = [fork.Process(target=store.remove, args=(record,)) for _ in range(2)]
    for process in processes:
        process.start()
    store.prune(max_bytes=0)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert store.find() == []


def test_waiting_for_another_builder_is_logged(store: EngineStore, caplog: pytest.LogCaptureFixture) -> None:
    started = fork.Event()

    def hold() -> None:
        with store.building(ENGINE):
            started.set()
            time.sleep(0.2)

    process = fork.Process(target=hold)
    process.start()
    assert started.wait(30)
    with caplog.at_level(logging.INFO), store.building(ENGINE) as building:
        assert building.existing is None
    process.join()
    assert "waiting for another process" in caplog.text
