"""Separate Python processes that need no imports: they are forked from a process that has already imported everything.

A new interpreter takes about 20 seconds of one core to import torch, its compiler and peft; here, this happens once per
session. Everything else is as in a new process: process id, signals, exit codes, environment, working folder, output
and child processes. Use `subprocess` for tests of what is imported, or of what a library reads when it is loaded.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

_IMPORTED = [
    "torch",
    "torch._dynamo",
    "torch.export",
    "torch.onnx",
    "peft",
    "accelerate",
    "onnx",
    "onnxruntime",
    "pytest",
    "frostline.cli",
    "frostline.demo.run",
    "frostline.export.run",
    "frostline.score.run",
    "frostline.train.launch",
    "frostline.train.loop.trainer",
    "frostline.train.report.page",
]


def fork_server() -> ForkServerContext:
    """Return a server whose new processes have all imports and no other threads."""
    context = get_context("forkserver")
    # This only has an effect before the first process is started.
    context.set_forkserver_preload(_IMPORTED)
    return context


class Python:
    """A process that runs what `python` would run with these arguments; it is used like a `subprocess.Popen`.

    Args:
        arguments: `-m module …`, `-c code …` or `script …`.
        cwd: the working folder; the current one by default.
        environment: the environment; that of this process by default.
        output: the file for standard output and error; without it, `said` returns them.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        self._said = tempfile.TemporaryDirectory() if output is None else None
        folder = self._said.name if self._said else ""
        outputs = (f"{folder}/out", f"{folder}/err") if output is None else (str(output), str(output))
        self._outputs = outputs
        self._process = fork_server().Process(
            target=_run, args=(arguments, str(cwd or Path.cwd()), dict(environment or os.environ), outputs)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process and return its exit code.

        Raises:
            TimeoutError: the process did not end within `timeout` seconds; it is killed.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s; it said: {self.said()}")
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        """Return what the process has written to standard output and error so far."""
        out, err = (Path(path).read_text() if Path(path).exists() else "" for path in self._outputs)
        return out, err


def run_python(
    *arguments: str,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python like `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`; see `Python`."""
    process = Python(*arguments, cwd=cwd, environment=environment)
    code = process.wait(timeout)
    return subprocess.CompletedProcess(arguments, code, *process.said())


def run_ranks(*arguments: str, environment: Mapping[str, str] | None = None, timeout: float) -> None:
    """Run two processes as torchrun starts them; both must exit with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**(environment or os.environ), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [Python(*arguments, environment=shared | rank) for rank in ranks]
    codes = [process.wait(timeout) for process in processes]
    assert codes == [0, 0], "\n".join(process.said()[1][-3000:] for process in processes)


def _run(arguments: Sequence[str], cwd: str, environment: dict[str, str], outputs: tuple[str, str]) -> None:
    """Run the arguments in the new process."""
    # A shell starts a job in the same way: signals to its process group reach only the job and its child processes.
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in zip((1, 2), outputs, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # Open the streams as Python does at its start: those of the server may be files, and those of the process a
    # terminal.
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        by_line = 1 if number == 2 or os.isatty(number) else -1
        made = open(number, "w", by_line, before.encoding, before.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, made)
    kind, *rest = arguments
    if kind == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, cwd)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, cwd)
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
