"""Run one worker of a training run on a cluster."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError

from frostline.cluster.supervisor import signal_of
from frostline.errors import FrostlineError
from frostline.progress import Progress

if TYPE_CHECKING:
    from frostline.train.loop.trainer import TrainOutcome
    from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

_PATIENCE = 120.0


def work(config: Mapping[str, Any]) -> TrainOutcome | None:
    """Train as one process of a run. Ray calls this in each worker, at the start and after each restart.

    Args:
        config: `settings` and `resume` of the run, `folder` (the working directory, which relative paths are resolved
            against), and `state` (an actor of `RunState`).
    Returns:
        The outcome; the one of the first worker is used. None if the run has failed with an error that a restart would
        not fix.
    Raises:
        FrostlineError: a setting or the data is invalid.
    """
    settings, resume, state = config["settings"], config["resume"], config["state"]
    if ray.get(state.failure.remote()) is not None:
        # A restart would fail with the same error.
        return None
    # Imported here, because Ray's own processes load this module, too.
    from frostline.train.launch import run_training
    from frostline.train.loop.checkpoint import latest_intact
    from frostline.train.loop.run_dir import LATEST, await_release

    os.chdir(config["folder"])
    _as_launched(settings)
    if ray.train.get_context().get_world_rank() == 0 and ray.get(state.has_begun.remote()):
        await_release(settings.output_dir, _PATIENCE)
        # A run that was resumed from another folder has no checkpoint in its own folder until it saves one.
        resume = LATEST if resume is None or latest_intact(settings.output_dir) is not None else resume
    try:
        return run_training(settings, resume, Progress(quiet=True), _Supervisor(state))
    except FrostlineError as error:
        ray.get(state.fail.remote(error))
        raise


def _as_launched(settings: RunSettings) -> None:
    """Set the environment variables that `accelerate launch` would set for these settings."""
    if settings.memory.sharding == "fsdp":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if not ray.get_gpu_ids():
        os.environ["ACCELERATE_USE_CPU"] = "true"


class _Supervisor:
    """Forward requests to stop or to save from Ray to the training loop."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._leaving: list[str] = []

    def stop_asked(self) -> signal.Signals | None:
        try:
            return signal_of(ray.get(self._state.stop_asked.remote()))
        except RayError as error:
            log.debug("cannot read the state of the run", exc_info=error)
            return None

    def save_asked(self) -> bool:
        info = ray.train.get_preemption_info()
        leaving = [] if info is None else info.preempted_node_ids
        new, self._leaving = leaving != self._leaving and bool(leaving), leaving
        if new:
            log.warning("Ray announced that nodes will be removed: saving a checkpoint")
        return new

    def begun(self) -> None:
        ray.get(self._state.begin.remote())
