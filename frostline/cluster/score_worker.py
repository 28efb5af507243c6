"""Define the worker of a scoring run: an actor that loads the networks once and scores videos."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from frostline.cluster.ledger import MOST_DEATHS, Key
from frostline.cluster.result_tables import table_of
from frostline.errors import FrostlineError
from frostline.rewards.inputs import COMPARES
from frostline.runtime.device import resolve_device
from frostline.score.request import Pair
from frostline.score.result import FACE_SCORE, VideoScore, columns
from frostline.score.rewards.loading import load_rewards
from frostline.score.scorer import Scorer
from frostline.score.settings import ScoreSettings
from frostline.video.downloads import DownloadLimits

_KEPT_REFERENCES = 16
_CRASHED = f"workers died {MOST_DEATHS} times while decoding or scoring this video; it is not tried again"


class ScoreWorker:
    """Score tables of pairs. Ray creates one instance for each worker.

    Args:
        settings: the settings that the results depend on.
        backend: the backend of the networks; missing engines are built.
        engines: the path of the engine store on the node.
        device: `cpu`, `cuda` or `auto`.
        batch: the number of frames per batch; see `Scorer`.
        downloads: limits for videos at URLs.
        folder: the working directory, which relative paths are resolved against; ignored if the node does not have it.
        ledger: the actor of `Ledger` that tracks the run.
    """

    def __init__(
        self,
        settings: ScoreSettings,
        backend: str,
        engines: str,
        device: str,
        batch: int,
        downloads: DownloadLimits,
        folder: str,
        ledger: Any,
    ) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._id = ray.get_runtime_context().get_actor_id()
        self._ledger = ledger
        ray.get(ledger.join.remote(self._id))
        # Ray sets OMP_NUM_THREADS to the CPUs of the worker; by default, torch would use all cores of the node.
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        try:
            self._labels = settings.labels()
            self._compares = not COMPARES.isdisjoint(settings.needs())
            rewards = load_rewards(settings, backend, Path(engines), resolve_device(device), batch)
        except FrostlineError as error:
            # Ray reports a failed start only as text, so the error itself is stored.
            ray.get(ledger.fail.remote(error))
            raise
        self._rewards = rewards
        self._settings = settings
        self._scorer = Scorer(rewards, settings, batch, downloads, _KEPT_REFERENCES)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score a table of pairs.

        Returns:
            A table with the results in the order of the pairs, followed by the other columns of the input.
        """
        pairs = self._pairs(table)
        keys = [(pair.video, pair.reference) for pair in pairs]
        deaths = ray.get(self._ledger.deaths.remote(keys))
        # Videos on which a worker died are scored alone, so that another death is counted for the right video.
        together = [pair for pair, died in zip(pairs, deaths, strict=True) if not died]
        alone = [pair for pair, died in zip(pairs, deaths, strict=True) if 0 < died < MOST_DEATHS]
        given_up = [
            replace(pair, fault=_CRASHED) for pair, died in zip(pairs, deaths, strict=True) if died >= MOST_DEATHS
        ]
        rows: dict[int, VideoScore] = {}
        try:
            for group in (together, *([pair] for pair in alone), given_up):
                rows |= {row.index: row for row in self._score(group)}
        except FrostlineError as error:
            ray.get(self._ledger.fail.remote(error))
            raise
        return self._table([rows[place] for place in range(len(pairs))], table)

    def _score(self, pairs: Sequence[Pair]) -> Iterator[VideoScore]:
        if not pairs:
            return
        by_place = {pair.index: (pair.video, pair.reference) for pair in pairs}
        self._begin([*by_place.values()])
        frames = 0

        def on_frames(count: int) -> None:
            nonlocal frames
            frames += count

        with ExitStack() as stack:
            times = {reward: stack.enter_context(reward.runtime.clock.collect()) for reward in self._rewards}
            for row in self._scorer.score(pairs, on_frames):
                self._ledger.finish.remote(self._id, by_place[row.index])
                yield row
            owners = Counter(name for reward in times for name in reward.active.stage_names)
            seconds: Counter[str] = Counter()
            for reward, of_reward in times.items():
                for name, spent in of_reward.read().items():
                    stage = name if owners[name] == 1 else f"{reward.label}.{name}"
                    seconds[f"{stage} ({spent.backend})"] += spent.milliseconds / 1000  # type: ignore[assignment]
        self._ledger.spend.remote(frames, dict(seconds))

    def _begin(self, keys: Sequence[Key]) -> None:
        ray.get(self._ledger.begin.remote(self._id, keys))

    def _table(self, rows: Sequence[VideoScore], table: pa.Table) -> pa.Table:
        if "index" in table.column_names:
            indices = table["index"].to_pylist()
            rows = [row.model_copy(update={"index": index}) for row, index in zip(rows, indices, strict=True)]
        scores = [label for label in self._labels if label != FACE_SCORE]
        metrics = sorted({name for row in rows for name in row.scores} - {*scores})
        names = columns([*scores, *metrics], FACE_SCORE in self._labels)
        if "index" not in table.column_names:
            names = tuple(name for name in names if name != "index")
        result = table_of(rows, names)
        for name in table.column_names:
            if name not in names and name != "fault":
                result = result.append_column(name, table[name])
        return result

    def _pairs(self, table: pa.Table) -> list[Pair]:
        """Return the rows of a table as pairs; the index of each pair is its position in the table."""
        cells: dict[str, list[str]] = {
            name: [value or "" for value in table[name].to_pylist()]
            if name in table.column_names
            else [""] * len(table)
            for name in ("video", "reference", "prompt", "fault")
        }
        if self._compares:
            cells["reference"] = [own or video for own, video in zip(cells["reference"], cells["video"], strict=True)]
        return [Pair(place, *values) for place, values in enumerate(zip(*cells.values(), strict=True))]
