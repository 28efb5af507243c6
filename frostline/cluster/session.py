"""The connection to a Ray cluster, and what its workers learn of this process."""

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
"""The address of a cluster that is started on this machine, and ended with the run."""
# What a worker on another node has to know of the environment of the process that started the run.
_PASSED_ON = ("FROSTLINE_", "GOMP_", "AWS_", "PYTHONPATH")


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster to use, and how much of it.

    address: `local`, `auto` (the cluster of this machine), `HOST:PORT` or `ray://HOST:PORT`. workers: None takes as
    many as there are GPUs in the cluster, or CPUs where there are none. cpus, gpus: of each worker; gpus None takes a
    whole one where the cluster has any.
    """

    address: str
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None


def require_ray() -> None:
    """Check that the extra is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    missing = [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--ray needs {', '.join(missing)}: uv pip install 'frostline[ray]'")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within the block this process is connected to a cluster; one that it was connected to before is used and kept.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    require_ray()
    _set_defaults()
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray puts a handler of its own in the place of the command line's.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            start_local()
        else:
            ray.init(address, runtime_env={"env_vars": dict(worker_environment(os.environ))}, **_QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = "" if address == LOCAL else "no Ray cluster answers there: "
        raise ConfigError(f"--ray {address}: {said}{error}") from error
    try:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def start_local(**options: Any) -> None:
    """Start a cluster on this machine and connect to it; `ray.shutdown` ends it.

    Ray gives it 30 seconds, which may be too few where other processes use the cores; then it is tried again.
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
            log.info("Ray did not start in time: once more")


def _set_defaults() -> None:
    # Read by Ray as it is imported. It would otherwise send statistics of use, and install what uv.lock says on nodes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def worker_environment(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables that workers on other nodes get: those of frostline, where modules are, S3 access."""
    return {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}


def sized(options: ClusterOptions) -> tuple[int, float]:
    """Return how many workers a connected cluster has room for, and the GPUs of each.

    Raises:
        ConfigError: it has no room for one.
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
            f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, and a worker needs "
            f"{options.cpus:g} and {gpus:g}: see --cpus-per-worker and --gpus-per-worker"
        )
    return options.workers or room, gpus


_TRIES = 4
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
