"""Train on a Ray cluster: run `frostline train` in workers that Ray starts, and restarts after a failure."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from frostline.cluster.session import connected
from frostline.cluster.supervisor import RunState
from frostline.cluster.train_worker import work
from frostline.errors import FrostlineError
from frostline.progress import Progress
from frostline.train.loop.run_dir import METRICS
from frostline.train.loop.signals import StopSignals
from frostline.train.loop.trainer import TrainOutcome
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

# The subfolder of the output folder for Ray's state of the run. It contains no checkpoints: frostline writes those.
STATE = "ray"


@dataclass(frozen=True)
class TrainCluster:
    """The Ray cluster of a training run, and the resources of its workers.

    Attributes:
        address: see `ClusterOptions`.
        workers: the number of processes.
        use_gpu: whether each process uses one GPU.
        cpus: CPUs per process; None for Ray's default.
        max_failures: the maximum number of restarts after workers were lost; -1 for no limit.
        storage: the shared path or URL where Ray stores the state of the run; None for a subfolder of `output_dir`.
    """

    address: str
    workers: int = 1
    use_gpu: bool = False
    cpus: float | None = None
    max_failures: int = 3
    storage: str | None = None


def train_on_cluster(
    settings: RunSettings, resume: str | None, cluster: TrainCluster, progress: Progress
) -> TrainOutcome:
    """Run `run_training` in the processes of a cluster.

    After a worker is lost, the run resumes from its last checkpoint. On SIGTERM or SIGINT, the workers finish the step,
    save a checkpoint and stop.

    Returns:
        The outcome of the first worker.
    Raises:
        FrostlineError: a setting or the data is invalid, or workers were lost more often than `max_failures`.
    """
    with connected(cluster.address), StopSignals() as stop:
        state: Any = ray.remote(RunState).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        config = {"settings": settings, "resume": resume, "folder": str(Path.cwd()), "state": state}
        resources = None if cluster.cpus is None else {"CPU": cluster.cpus, **({"GPU": 1} if cluster.use_gpu else {})}
        trainer = TorchTrainer(
            work,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=cluster.workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                storage_path=cluster.storage or str((settings.output_dir / STATE).absolute()),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
            ),
        )
        fitting = _Fitting(trainer)
        _watch(fitting, stop, state, settings, progress)
        failure: Any = ray.get(state.failure.remote())
        if failure is not None:
            raise failure
        outcome = fitting.result()
        if outcome.stopped_by is None and stop.requested and outcome.step < settings.train.max_train_steps:
            # Another worker stopped the run first, so the outcome of the first worker does not name the signal.
            outcome = replace(outcome, stopped_by=stop.requested)
        return outcome


class _Fitting(threading.Thread):
    """Run `trainer.fit` in a thread: in the main thread, Ray handles SIGINT and stops the workers immediately."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer
        self._outcome: TrainOutcome | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._trainer.fit().return_value
        except Exception as error:
            self._error = error

    def result(self) -> TrainOutcome:
        if self._error is not None:
            log.debug("Ray reported an error", exc_info=self._error)
            lines = [line for line in str(self._error).splitlines() if line.strip()]
            raise FrostlineError(f"the workers failed: {lines[-1].strip() if lines else self._error}") from self._error
        if self._outcome is None:
            raise FrostlineError("Ray stopped the run before it was finished: continue with --resume latest")
        return self._outcome


def _watch(fitting: _Fitting, stop: StopSignals, state: Any, settings: RunSettings, progress: Progress) -> None:
    """Wait until the run ends, forward signals to the workers, and show the progress."""
    told = False
    with progress.bar("train the LoRA", settings.train.max_train_steps) as bar:
        done = 0
        while fitting.is_alive():
            fitting.join(0.5)
            if stop.requested is not None and not told:
                told = True
                state.ask_to_stop.remote(int(stop.requested))
            steps = _steps(settings.output_dir / METRICS)
            bar.advance(max(0, steps - done))
            done = max(done, steps)


def _steps(metrics: Path) -> int:
    try:
        return metrics.read_bytes().count(b"\n")
    except OSError:
        return 0
