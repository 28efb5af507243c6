"""Build in several processes: tracing and compiling use one core each, and stages are independent."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from frostline.errors import EngineError
from frostline.export.exporter import build_stage
from frostline.export.model import load_stages
from frostline.export.recipe import Recipe
from frostline.export.tracing.trace_cache import Traces
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.device import free_bytes
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import precision_of
from frostline.runtime.stage import Stage
from frostline.stages.staged_model import LoadedStages

log = logging.getLogger(__name__)

# Memory of a process with torch, a tracer and a compiler, without the model.
_BYTES_PER_JOB = 3 * 2**30
# Copies of the model's weights in one process: the model, and a graph or an engine.
_WEIGHTS_PER_JOB = 2
_PR_SET_PDEATHSIG = 1

Seconds = dict[tuple[str, str], float]


@dataclass(frozen=True)
class _Work:
    """The arguments of the build that are the same for all stages."""

    recipe: Recipe
    device: str
    engines_dir: Path
    options: BuildOptions
    force: bool
    threads: int


def fitting_jobs(staged: LoadedStages) -> int:
    """Return the number of processes for the available cores and memory: at most one per stage, and one on a GPU."""
    if staged.device.type != "cpu":
        return 1
    weights = sum(tensor.numel() * tensor.element_size() for tensor in staged.weights())
    by_memory = free_bytes(staged.device) // (_BYTES_PER_JOB + _WEIGHTS_PER_JOB * weights)
    return max(1, min(len(os.sched_getaffinity(0)), len(staged.stages), by_memory))


def build_ahead(
    staged: LoadedStages,
    recipe: Recipe,
    stages: Sequence[Stage],
    store: EngineStore,
    options: BuildOptions,
    *,
    jobs: int,
    force: bool = False,
    announce: Callable[[str], None] = lambda step: None,
) -> Seconds:
    """Build the engines of `stages` for the recipe's backends in `jobs` processes, without verification.

    The caller verifies them afterwards, so that latencies are measured without other load. A failed build is not
    reported: the caller builds that engine again and gets the error. An exception, such as Ctrl-C, ends the
    processes and leaves no incomplete engine.

    Args:
        force: rebuild existing engines.
        announce: called with the progress.
    Returns:
        Seconds of each build, by stage and backend; without those that existed or failed.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    work = _Work(recipe, str(staged.device), store.root, options, force, threads)
    # Longest builds first, so that none of them starts last.
    ordered = sorted(stages, key=_graph_size, reverse=True)
    others = set(active_children())
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (work,))
    try:
        seconds = _collect({pool.submit(_build, stage.name): stage.name for stage in ordered}, announce)
    except BaseException as error:
        # Kill the processes, because waiting for their builds could take minutes.
        _kill(set(active_children()) - others)
        pool.shutdown(cancel_futures=True)
        with suppress(EngineError):
            store.prune()
        if not isinstance(error, BrokenProcessPool):
            raise
        log.warning("a build process died (out of memory?): continuing in this process")
        return {}
    pool.shutdown()
    return seconds


def _collect(futures: Mapping[Future[Seconds], str], announce: Callable[[str], None]) -> Seconds:
    seconds: Seconds = {}
    pending = set(futures)
    while pending:
        running = ", ".join(sorted(name for future, name in futures.items() if future.running()))
        announce(f"{len(futures) - len(pending)} of {len(futures)} stages built; {running}")
        done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            seconds |= future.result()
    return seconds


def _kill(processes: Collection[BaseProcess]) -> None:
    """Kill processes and all their child processes, such as compilers, at once."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            # A process that is not suspended could start another child process in the meantime.
            family.suspend()
            for member in (*family.children(recursive=True), family):
                with suppress(psutil.NoSuchProcess):
                    member.kill()
    for process in processes:
        process.join()


_worker: tuple[_Work, LoadedStages] | None = None


def _prepare(work: _Work) -> None:
    """Initialise a process: load the model once for all its stages."""
    global _worker
    if sys.platform == "linux":
        # If the parent process is killed, it cannot stop this process, but the kernel can.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Ctrl-C reaches all processes of a terminal; the parent process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(work.threads)
    logging.getLogger("frostline").setLevel(logging.WARNING)
    _worker = work, load_stages(work.recipe, work.device)


def _build(stage_name: str) -> Seconds:
    assert _worker is not None, "`_prepare` runs first in each process of the pool"
    work, staged = _worker
    stage, traces = staged.stages[stage_name], Traces()
    seconds: Seconds = {}
    for backend in work.recipe.backends_for(precision_of(stage)):
        start = time.monotonic()
        try:
            _, built = build_stage(
                stage,
                backend,
                EngineStore(work.engines_dir),
                options=work.options,
                force=work.force,
                traces=traces,
            )
        except EngineError:
            continue
        if built:
            seconds[stage_name, backend] = time.monotonic() - start
    return seconds


def _graph_size(stage: Stage) -> int:
    return sum(1 for network in stage.networks for _ in network.module.modules())
