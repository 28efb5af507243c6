"""The worker of a scoring run: an actor that keeps the networks and scores the videos that it is given."""

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
_CRASHED = f"a worker died {MOST_DEATHS} times while it decoded or scored this video: it is not tried again"


class ScoreWorker:
    """Scores tables of pairs; made by Ray, once for each worker.

    Args:
        settings: what the results depend on.
        backend, engines, device, batch: as `RunOptions` has them; engines are built where the node lacks them.
        downloads: limits of videos at URLs.
        folder: that relative paths are relative to, where the node has it.
        ledger: the actor that knows what workers have in hand.
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
        # As many as Ray has put aside: torch would take all cores of the node.
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        try:
            self._labels = settings.labels()
            self._compares = not COMPARES.isdisjoint(settings.needs())
            rewards = load_rewards(settings, backend, Path(engines), resolve_device(device), batch)
        except FrostlineError as error:
            # What Ray says of a failed start is text alone.
            ray.get(ledger.fail.remote(error))
            raise
        self._rewards = rewards
        self._settings = settings
        self._scorer = Scorer(rewards, settings, batch, downloads, _KEPT_REFERENCES)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the results of pairs, in their order, and behind them the columns of the table that are no results."""
        pairs = self._pairs(table)
        keys = [(pair.video, pair.reference) for pair in pairs]
        deaths = ray.get(self._ledger.deaths.remote(keys))
        # What a worker died on goes alone, so that the next death is that of nothing else.
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
        """The rows of a table, each with its place in it as index."""
        cells: dict[str, list[str]] = {
            name: [value or "" for value in table[name].to_pylist()]
            if name in table.column_names
            else [""] * len(table)
            for name in ("video", "reference", "prompt", "fault")
        }
        if self._compares:
            cells["reference"] = [own or video for own, video in zip(cells["reference"], cells["video"], strict=True)]
        return [Pair(place, *values) for place, values in enumerate(zip(*cells.values(), strict=True))]
