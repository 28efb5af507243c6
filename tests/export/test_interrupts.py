"""Ctrl-C during an export: the export ends, and no half-built engine and no process is left."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from forked import Python

from frostline.runtime.engines.store import EngineStore

pytestmark = pytest.mark.timeout(600)
pytest.importorskip("tensorrt_rtx")

Start = Callable[..., Python]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*arguments)`: start an export of tiny in a separate process group, as in a terminal."""
    started = []

    def run(*arguments: str) -> Python:
        command = ["-m", "frostline", "-v", "export", "tiny", "--backend", "tensorrt-rtx", *arguments]
        process = Python(*command, "--engines-dir", str(tmp_path / "engines"), output=tmp_path / "log")
        (tmp_path / "log").touch()
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(reached: Callable[[], object], process: Python, folder: Path) -> None:
    while not reached():
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        time.sleep(0.01)


def assert_ended_with_nothing_left(process: Python, folder: Path) -> None:
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    log = (folder / "log").read_text()
    assert process.returncode == 130, log[-2000:]
    assert "Traceback" not in log
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running()]
    assert EngineStore(folder / "engines").find() == []
    files = [path.name for path in (folder / "engines").rglob("*") if path.is_file()]
    assert all(name.endswith(".lock") for name in files), files


def test_within_tensorrt(start: Start, tmp_path: Path) -> None:
    """Interrupt while TensorRT calls back to log: an exception there would be lost, or crash the process."""
    process = start("--stages", "text_encoder")
    wait_until(lambda: "VERBOSE: " in (tmp_path / "log").read_text(), process, tmp_path)
    assert_ended_with_nothing_left(process, tmp_path)


def test_while_several_processes_build(start: Start, tmp_path: Path) -> None:
    process = start("--stages", "text_encoder,face_embedder", "--jobs", "2")
    building = (tmp_path / "engines").glob
    wait_until(lambda: len([*building("*/*/.*.building")]) == 2, process, tmp_path)
    assert_ended_with_nothing_left(process, tmp_path)
