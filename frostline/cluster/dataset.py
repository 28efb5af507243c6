"""Videos of a Ray dataset, scored by a pool of actors."""

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
    """Score the videos of a dataset; lazily, as all of Ray Data.

    A worker that dies is started again. Videos that it had in hand are then scored one by one; one on which a worker
    dies twice becomes an error row. A block goes to one worker: with blocks of few rows
    (`dataset.repartition(target_num_rows_per_block=16)`) the load is balanced well.

    Args:
        dataset: its column `video` has paths or URLs; `reference` and `prompt` are optional, and `fault` says why a row
            is not to be tried. Where the rewards need a reference, a video without one is scored against itself.
            Other columns are kept.
        settings: what the results depend on.
        workers: how many actors, or the least and the most.
        num_cpus, num_gpus: of each; a fraction of a GPU lets several share one.
        backend, device, batch: as `frostline score` has them.
        downloads: limits of videos at URLs.
        engines: the engine store, on each node: a folder of its own, or one that is shared.
        folder: that relative paths are relative to, on the nodes; the current folder if None.
        ledger: an actor of `Ledger`, which knows how the run goes; made if None.
    Returns:
        The columns of `frostline score --out`, without `index` unless the dataset has it, then those of the dataset.
        Rows come in any order unless the execution options of Ray Data ask for that of the input.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    return dataset.map_batches(
        ScoreWorker,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # A second task in the queue of a worker would wait behind a long video.
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
    """Return a new actor of `Ledger`, which takes no CPU and survives its worker process."""
    return ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
