"""Score the videos of a Ray dataset with a pool of actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from frostline.cluster.ledger import Ledger
from frostline.cluster.score_worker import ScoreWorker
from frostline.score.settings import ScoreSettings
from frostline.video.downloads import DEFAULT_LIMITS, DownloadLimits


def score_dataset(
    dataset: Dataset,
    settings: ScoreSettings,
    *,
    workers: int | tuple[int, int],
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    backend: str = "auto",
    engines: Path = Path("engines"),
    device: str = "auto",
    batch: int = 32,
    downloads: DownloadLimits = DEFAULT_LIMITS,
    folder: Path | None = None,
    ledger: Any = None,
) -> Dataset:
    """Score the videos of a dataset. Like all transforms of Ray Data, this is lazy.

    If a worker dies, Ray restarts it, and the videos that it was processing are scored one at a time. If workers die
    twice on the same video, the video becomes an error row. Each block is processed by one worker; small blocks
    (`dataset.repartition(target_num_rows_per_block=16)`) balance the load.

    Args:
        dataset: the column `video` contains paths or URLs. The columns `reference` and `prompt` are optional; a row
            with text in the optional column `fault` is not scored, and the text becomes its error. If the rewards need
            a reference, a video without one is scored against itself. All other columns are kept.
        settings: the settings that the results depend on.
        workers: the number of actors, or its minimum and maximum.
        num_cpus: CPUs per worker.
        num_gpus: GPUs per worker; several workers can share one GPU with a fraction.
        backend: the backend of the networks, as in `frostline score`.
        engines: the path of the engine store on each node: a local or a shared folder.
        device: `cpu`, `cuda` or `auto`.
        batch: the number of frames per batch; see `Scorer`.
        downloads: limits for videos at URLs.
        folder: the working directory of the workers, which relative paths are resolved against; the current directory
            if None.
        ledger: an actor of `Ledger` that tracks the run; created if None.
    Returns:
        A dataset with the columns of `frostline score --out` (`index` only if the input has it), followed by the other
        columns of the input. The order of rows is arbitrary unless Ray Data's execution options preserve it.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    return dataset.map_batches(
        ScoreWorker,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # A queued second task would wait for the videos of the first, even if another worker is idle.
        compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        fn_constructor_kwargs={
            "settings": settings,
            "backend": backend,
            "engines": str(engines),
            "device": device,
            "batch": batch,
            "downloads": downloads,
            "folder": str(folder or Path.cwd()),
            "ledger": make_ledger() if ledger is None else ledger,
        },
    )


def make_ledger() -> Any:
    """Create an actor of `Ledger` that reserves no CPU and is restarted if its process dies."""
    return ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
