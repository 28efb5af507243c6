"""Compute the frozen outputs of all samples stage by stage, with one stage at a time in memory, into the cache of a
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from frostline.errors import ConfigError, DataError
from frostline.progress import Bar
from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.device import free_memory
from frostline.stages.conditions import Condition
from frostline.train.data.dataset import CollatedBatch
from frostline.train.precompute.frozen import Frozen
from frostline.train.precompute.visits import Visit
from frostline.train.processes import gather_from_processes, process_count, process_index
from frostline.train.step.conditioning import FittedBatch

_Stages = tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """A result that a visit needs.

    Attributes:
        code: the module of the function that computes it.
    """

    name: str
    stages: _Stages
    code: str
    keys: tuple[str, ...]

    @classmethod
    def of(cls, condition: Condition) -> _Asked:
        return cls(condition.name, condition.stages, condition.compute.__module__, condition.keys)


@dataclass(frozen=True)
class Indexed:
    """A visit of this process, and the results that it needs.

    Attributes:
        shape: (T, 3, H, W) of its samples.
    """

    visit: Visit
    shape: tuple[int, ...]
    asked: tuple[_Asked, ...]


def index(frozen: Frozen, visits: Sequence[Visit], on_rows: Callable[[int], None] = lambda rows: None) -> list[Indexed]:
    """Read the samples of this process, and record the content keys of their frozen outputs.

    A result that several visits need, in any process, is assigned to the first of them.

    Args:
        on_rows: called with the number of samples that were just read.
    """
    own = [number for number in range(len(visits)) if number % process_count() == process_index()]
    found = []
    for visit, data in _read_ahead([visits[number] for number in own]):
        fitted = frozen.conditioner.fit(data)
        asked = tuple(_Asked.of(condition) for condition in frozen.of(visit, fitted))
        found.append(Indexed(visit, tuple(fitted.video.shape[1:]), asked))
        on_rows(len(visit.rows))
    first: dict[tuple[str, str], int] = {}
    for numbers in gather_from_processes([(number, each.asked) for number, each in zip(own, found, strict=True)]):
        for number, asked in numbers:
            for each in asked:
                for key in each.keys:
                    place = each.name, key
                    first[place] = min(number, first.get(place, number))
    return [
        replace(
            each,
            asked=tuple(
                # Within a visit, the conditioner computes the same content only once.
                replace(a, keys=tuple(key if first[a.name, key] == number else "" for key in a.keys))
                for a in each.asked
            ),
        )
        for number, each in zip(own, found, strict=True)
    ]


def passes_of(indexed: Sequence[Indexed]) -> list[_Stages]:
    """Return the stages of each pass of all processes, in order."""
    own = [*dict.fromkeys(asked.stages for each in indexed for asked in each.asked)]
    return [*dict.fromkeys(stages for of_one in gather_from_processes(own) for stages in of_one)]


def entries(frozen: Frozen, each: Indexed, stages: _Stages) -> list[list[str]]:
    """Return, for each row of a visit, the keys of the cache entries that a pass must compute."""
    rows: list[list[str]] = [[] for _ in each.visit.rows]
    for asked in each.asked:
        if asked.stages == stages:
            full = frozen.conditioner.entry_keys(asked.name, stages, asked.keys, asked.code)
            for row, (key, content) in enumerate(zip(full, asked.keys, strict=True)):
                rows[row] += [key] if content else []
    return rows


def count_rows(indexed: Sequence[Indexed]) -> int:
    """Return the total number of rows in the passes over the visits of this process."""
    return sum(len(each.visit.rows) * len({asked.stages for asked in each.asked}) for each in indexed)


def run_passes(
    frozen: Frozen,
    indexed: Sequence[Indexed],
    cache: FrozenOutputCache,
    bar: Bar,
    batch_size: int | None = None,
) -> int:
    """Compute missing outputs pass by pass, and free the stages after each pass. Return the number of computed rows.

    Args:
        indexed: from `index`, with this `frozen`.
        bar: advanced by `count_rows` in total.
        batch_size: number of samples computed together; if None, the run's own batches, for bit-identical results.
    Raises:
        ConfigError: the cache is too small for all outputs.
        DataError: a sample cannot be read, or the cache cannot be written.
    """
    computed, owed = 0, []
    for stages in passes_of(indexed):
        label = stages[0] if stages else "references"
        missing = []
        total = sum(len(each.visit.rows) for each in indexed if _has(each, stages))
        done = 0

        def advance(rows: int, label: str = label, total: int = total) -> None:
            nonlocal done
            done += rows
            bar.describe(f"{label}: sample {done} of {total}")
            bar.advance(rows)

        for each in (each for each in indexed if _has(each, stages)):
            rows = entries(frozen, each, stages)
            owed += [key for of_row in rows for key in of_row]
            # Reading also checks: damaged entries are computed again.
            absent = [n for n, of_row in enumerate(rows) if any(cache.get(key) is None for key in of_row)]
            advance(len(rows) - len(absent))
            if absent:
                visit = replace(each.visit, rows=tuple(each.visit.rows[n] for n in absent))
                missing.append((visit, each.shape))
        for visit, data in _read_ahead(_grouped(missing, batch_size)):
            _compute(frozen, visit, data, stages)
            if not cache.writable:
                raise DataError("the frozen outputs cannot be stored: see the warning above")
            computed += len(visit.rows)
            advance(len(visit.rows))
        frozen.runtime.release_weights(*stages, engines=True)
        free_memory()
        # A later pass uses results of other processes from this pass.
        gather_from_processes(None)
    if any(cache.on_disk(key) is None for key in owed):
        raise ConfigError(
            "cache_bytes: the cache is too small for all frozen outputs of the run, so that "
            "entries were evicted: increase it"
        )
    return computed


def _has(each: Indexed, stages: _Stages) -> bool:
    return any(asked.stages == stages for asked in each.asked)


@torch.no_grad()
def _compute(frozen: Frozen, visit: Visit, data: CollatedBatch, stages: _Stages) -> None:
    fitted: FittedBatch = frozen.conditioner.fit(data)
    dtype = visit.source.autocast
    with torch.autocast(frozen.conditioner.model.device.type, dtype, enabled=dtype is not None):
        for condition in frozen.of(visit, fitted):
            if condition.stages == stages:
                frozen.conditioner.cached(condition)


def _grouped(missing: Sequence[tuple[Visit, tuple[int, ...]]], batch_size: int | None) -> list[Visit]:
    """Group visits into batches of samples of one shape and source; return them unchanged if the size is None."""
    if batch_size is None:
        return [visit for visit, _ in missing]
    alike: dict[tuple[object, ...], tuple[Visit, list[int]]] = {}
    for visit, shape in missing:
        alike.setdefault((id(visit.source), shape), (visit, []))[1].extend(visit.rows)
    return [
        replace(visit, rows=tuple(rows[first : first + batch_size]))
        for visit, rows in alike.values()
        for first in range(0, len(rows), batch_size)
    ]


def _read_ahead(visits: Sequence[Visit]) -> Iterator[tuple[Visit, CollatedBatch]]:
    """Read the samples of each visit while the previous ones are processed."""
    if not visits:
        return
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(visits[0].read)
        for number, visit in enumerate(visits):
            data = following.result()
            if number + 1 < len(visits):
                following = reader.submit(visits[number + 1].read)
            yield visit, data
