"""Connect to a Ray cluster, and choose the number of workers and their environment variables."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from frostline.errors import ConfigError

log = logging.getLogger(__name__)

LOCAL = "local"
"""The address of a cluster that is started on this machine, and stopped at the end of the run."""
# Prefixes of the environment variables that are passed to the workers.
_PASSED_ON = ("FROSTLINE_", "GOMP_", "AWS_", "PYTHONPATH")


@dataclass(frozen=True)
class ClusterOptions:
    """The Ray cluster of a scoring run, and the resources of its workers.

    Attributes:
        address: `local`, `auto` (the cluster that this machine belongs to), `HOST:PORT` or `ray://HOST:PORT`.
        workers: the number of workers; None for as many as the CPUs and GPUs of the cluster allow.
        cpus: CPUs per worker.
        gpus: GPUs per worker; None for 1 if the cluster has GPUs, and 0 otherwise.
    """

    address: str
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None


def require_ray() -> None:
    """Check that the packages of the extra `ray` are installed, without importing them.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--ray needs {', '.join(missing)}: uv pip install 'frostline[ray]'")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster within the block. An existing connection is used, and stays open afterwards.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached at the address.
    """
    require_ray()
    _set_defaults()
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray replaces the SIGTERM handler of the command; it is restored below.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            start_local()
        else:
            ray.init(address, runtime_env={"env_vars": dict(worker_environment(os.environ))}, **_QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = "" if address == LOCAL else "cannot connect to a Ray cluster at this address: "
        raise ConfigError(f"--ray {address}: {said}{error}") from error
    try:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def start_local(**options: Any) -> None:
    """Start a cluster on this machine and connect to it; `ray.shutdown` stops it.

    The start is repeated if it exceeds Ray's timeout of 30 seconds, which can happen if other processes use the CPUs.

    Raises:
        RuntimeError: Ray cannot be started.
    """
    _set_defaults()
    import ray

    for left in reversed(range(_TRIES)):
        try:
            ray.init(LOCAL, include_dashboard=False, **_QUIET, **options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise RuntimeError(f"Ray cannot be started: {error}") from error
            log.info("Ray did not start in time; trying again")


def _set_defaults() -> None:
    # Ray reads these when it is imported. They disable usage statistics, and copying a `uv run` environment to workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def worker_environment(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables that are passed to workers: those of frostline, GNU OpenMP and AWS, and PYTHONPATH."""
    return {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}


def sized(options: ClusterOptions) -> tuple[int, float]:
    """Return the number of workers to start on the connected cluster, and the GPUs per worker.

    Raises:
        ConfigError: the cluster has too few resources for one worker.
    """
    import ray

    there = ray.cluster_resources()
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if there.get("GPU") else 0.0
    room = int(there.get("CPU", 0) / options.cpus) if options.cpus else 1
    if gpus:
        room = min(room, int(there.get("GPU", 0) / gpus))
    if room < 1:
        raise ConfigError(
            f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, but a worker needs "
            f"{options.cpus:g} and {gpus:g}: reduce --cpus-per-worker or --gpus-per-worker"
        )
    return options.workers or room, gpus


_TRIES = 4
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
