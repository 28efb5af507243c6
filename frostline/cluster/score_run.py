"""A scoring run on a cluster: what is left to do, results as they come, one file in the order of the input."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from frostline.atomic_io import atomic_write
from frostline.cluster.dataset import make_ledger, score_dataset
from frostline.cluster.file_systems import exists
from frostline.cluster.pair_files import PairSource
from frostline.cluster.parts import ResultParts
from frostline.cluster.result_files import StoredRows, upload
from frostline.cluster.result_tables import rows_of
from frostline.cluster.session import ClusterOptions, connected, sized
from frostline.errors import ConfigError, DataError, FrostlineError
from frostline.paths import is_url
from frostline.progress import Progress
from frostline.score.request import Pair
from frostline.score.result import FACE_SCORE, VideoScore
from frostline.score.rewards.loading import check_backend
from frostline.score.run import ScoreOutcome, check_same
from frostline.score.settings import ScoreSettings
from frostline.score.summary import Summary, summarize
from frostline.video import probe_video
from frostline.video.downloads import DEFAULT_LIMITS, DownloadLimits

log = logging.getLogger(__name__)

# A worker takes so many videos at once at most; fewer where there are few, so that all workers end together.
_MOST_AT_ONCE, _TURNS = 32, 16
_COLUMNS = ("index", "video", "reference", "prompt", "fault")


@dataclass(frozen=True)
class ClusterRun:
    """How to run, on which the results do not depend; `out` is a path or a URL, the others are as in `RunOptions`."""

    out: str
    cluster: ClusterOptions
    resume: bool = False
    overwrite: bool = False
    backend: str = "auto"
    device: str = "auto"
    engines: Path = Path("engines")
    batch: int = 32
    downloads: DownloadLimits = DEFAULT_LIMITS


def score_on_cluster(
    source: PairSource, settings: ScoreSettings, options: ClusterRun, progress: Progress
) -> ScoreOutcome:
    """Score what `source` has on a Ray cluster; returns rows that are read from `options.out` at each use.

    Raises:
        ConfigError: as `run_score`, or there is no cluster.
        DataError: the file of results cannot be read or written.
        EngineError: the engines that were asked for cannot be built.
        FrostlineError: workers fail for a reason that is no video's.
    """
    start = time.monotonic()
    labels = settings.labels()
    stored, parts = StoredRows(options.out, labels), ResultParts(f"{options.out}.parts")
    _open_results(stored, parts, options)
    with progress.task("look at the pairs"):
        count = source.check()
        if source.reference is not None and Path(source.reference).exists():
            _check_reference(source.reference)
        if options.resume and stored.exists():
            _take_over(stored, parts)
        left = sum(1 for _ in _left(source, parts, settings, options.out))
    frames, seconds = 0, {}
    if left:
        frames, seconds = _score(_left(source, parts, settings, options.out), left, settings, options, parts, progress)
    with progress.task("write the results"):
        if len(parts) != count:
            raise FrostlineError(f"{count - len(parts)} of {count} videos have no result: go on with --resume")
        stored.rewrite(parts)
        of_others = [label for label in labels if label != FACE_SCORE]
        summary = summarize(parts, time.monotonic() - start, frames, seconds, of_others)
        _write_summary(options.out, summary)
        parts.delete()
    return ScoreOutcome(stored, summary, labels)


def _open_results(stored: StoredRows, parts: ResultParts, options: ClusterRun) -> None:
    if options.resume and options.overwrite:
        raise ConfigError("--resume keeps the results in --out, --overwrite does not: give one of them")
    check_backend(options.backend)
    if not (options.resume or options.overwrite) and (name := _there(stored, parts)):
        raise ConfigError(f"{name} is there already: go on from its results (--resume), or replace it (--overwrite)")
    stored.check_writable()
    if options.overwrite:
        parts.delete()


def _there(stored: StoredRows, parts: ResultParts) -> str:
    if stored.exists():
        return stored.name
    return parts.folder if exists(parts.folder) else ""


def _check_reference(reference: str) -> None:
    try:
        probe_video(reference)
    except DataError as error:
        raise ConfigError(f"the reference {error}") from error


def _take_over(stored: StoredRows, parts: ResultParts) -> None:
    """Let the rows of an earlier run be parts of this one: a file of results may end anywhere."""
    stored.fetch()
    there = {index for index, _ in parts.lines()}
    for row in stored:
        if row.index not in there:
            parts.add(row)
    parts.flush()


def _left(source: PairSource, parts: ResultParts, settings: ScoreSettings, name: str) -> Iterator[Pair]:
    """The pairs that have no result yet; both are gone through side by side.

    Raises:
        ConfigError: a result is of another video or of other settings.
    """
    by_prompt, wanted = "prompt" in source.needs, str(settings)
    done = iter(parts)
    row = next(done, None)
    for pair in source:
        if row is not None and row.index == pair.index:
            check_same(row, pair, wanted, by_prompt, name)
            row = next(done, None)
        else:
            yield pair
    if row is not None:
        check_same(row, None, wanted, by_prompt, name)


def _score(
    pairs: Iterator[Pair],
    count: int,
    settings: ScoreSettings,
    options: ClusterRun,
    parts: ResultParts,
    progress: Progress,
) -> tuple[int, dict[str, float]]:
    """Keep the results of `count` pairs; returns frames that were scored, and seconds by stage and backend."""
    with connected(options.cluster.address):
        workers, gpus = sized(options.cluster)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ledger = make_ledger()
        at_once = max(1, min(_MOST_AT_ONCE, count // (workers * _TURNS)))
        tables: list[Any] = [ray.put(table) for table in _tables(pairs, at_once, str(settings), parts)]
        scored = score_dataset(
            ray.data.from_arrow_refs(tables),
            settings,
            workers=min(workers, max(1, len(tables))),
            num_cpus=options.cluster.cpus,
            num_gpus=gpus,
            backend=options.backend,
            engines=options.engines,
            device=options.device,
            batch=options.batch,
            downloads=options.downloads,
            ledger=ledger,
        )
        try:
            with progress.bar("score", count) as bar:
                bar.describe(f"{workers} workers")
                for table in _blocks(scored) if tables else ():
                    for row in rows_of(table):
                        parts.add(row)
                    bar.advance(table.num_rows)
        except RayError as error:
            failure: Any = ray.get(ledger.failure.remote())
            raise failure or _plain(error) from error
        finally:
            parts.flush()
        return ray.get(ledger.spent.remote())


def _blocks(scored: ray.data.Dataset) -> Iterator[pa.Table]:
    for block in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(block, pa.Table)
        yield block


def _tables(pairs: Iterator[Pair], at_once: int, settings: str, parts: ResultParts) -> Iterator[pa.Table]:
    """The pairs as tables of a few rows; those that no table can hold get their result here."""
    block: list[Pair] = []
    for pair in pairs:
        if unusable := _not_utf8(pair):
            parts.add(_failed(pair, unusable, settings))
            continue
        block.append(pair)
        if len(block) == at_once:
            yield _table(block)
            block = []
    if block:
        yield _table(block)


def _table(pairs: list[Pair]) -> pa.Table:
    values = {name: [getattr(pair, name) for pair in pairs] for name in _COLUMNS}
    types = {name: pa.int64() if name == "index" else pa.string() for name in _COLUMNS}
    return pa.table(values, pa.schema(list(types.items())))


def _not_utf8(pair: Pair) -> str:
    try:
        "".join((pair.video, pair.reference, pair.prompt, pair.fault)).encode()
    except UnicodeEncodeError:
        return f"{pair.video}: a name or prompt is not UTF-8, which tables of Ray cannot hold: score it without --ray"
    return ""


def _failed(pair: Pair, error: str, settings: str) -> VideoScore:
    values: dict[str, Any] = {"index": pair.index, "video": pair.video, "reference": pair.reference}
    return VideoScore(**values, prompt=pair.prompt, status="error", error=error, settings=settings)


def _plain(error: RayError) -> FrostlineError:
    """An error of Ray in its own words, of which the last line says what was wrong."""
    log.debug("Ray", exc_info=error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return FrostlineError(f"the workers fail: {lines[-1].strip() if lines else type(error).__name__}")


def _write_summary(out: str, summary: Summary) -> None:
    text = json.dumps(summary.json_values(), indent=2) + "\n"
    name = f"{out.rpartition('.')[0]}.summary.json"
    if not is_url(out):
        with atomic_write(Path(name)) as part:
            part.write_text(text)
        return
    with tempfile.NamedTemporaryFile("w") as copy:
        copy.write(text)
        copy.flush()
        upload(Path(copy.name), name)
