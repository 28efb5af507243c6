"""Run scoring on a cluster: find the pairs without a result, collect results, and write one file in input order."""

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
from frostline.score.run import ScoreOutcome, ScoringOptions, check_same
from frostline.score.settings import ScoreSettings
from frostline.score.summary import Summary, summarize
from frostline.video import probe_video

log = logging.getLogger(__name__)

# The maximum number of videos per task, and the minimum number of tasks per worker, so that no worker idles for long.
_MOST_AT_ONCE, _TURNS = 32, 16
_COLUMNS = ("index", "video", "reference", "prompt", "fault")


@dataclass(frozen=True, kw_only=True)
class ClusterRun(ScoringOptions):
    """Options of a run on a cluster.

    Attributes:
        out: the path or URL of the results file.
        cluster: the Ray cluster and its workers.
    """

    out: str
    cluster: ClusterOptions


def score_on_cluster(
    source: PairSource, settings: ScoreSettings, options: ClusterRun, progress: Progress
) -> ScoreOutcome:
    """Score the pairs of `source` on a Ray cluster.

    Returns:
        The outcome; its rows are read from `options.out` at each iteration.
    Raises:
        ConfigError: see `run_score`; also if the cluster cannot be reached.
        DataError: the results file cannot be read or written.
        EngineError: the requested engines cannot be built.
        FrostlineError: the workers fail for a reason that is not specific to one video.
    """
    start = time.monotonic()
    labels = settings.labels()
    stored, parts = StoredRows(options.out, labels), ResultParts(f"{options.out}.parts")
    _open_results(stored, parts, options)
    with progress.task("check the pairs"):
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
            raise FrostlineError(f"{count - len(parts)} of {count} videos have no result: continue with --resume")
        stored.rewrite(parts)
        of_others = [label for label in labels if label != FACE_SCORE]
        summary = summarize(parts, time.monotonic() - start, frames, seconds, of_others)
        _write_summary(options.out, summary)
        parts.delete()
    return ScoreOutcome(stored, summary, labels)


def _open_results(stored: StoredRows, parts: ResultParts, options: ClusterRun) -> None:
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: use only one of them")
    check_backend(options.backend)
    if not (options.resume or options.overwrite) and (name := _there(stored, parts)):
        raise ConfigError(f"{name} already exists: use --resume to continue, or --overwrite to replace it")
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
    """Copy the rows of the results file of an earlier run, which may be incomplete, to the parts of this run."""
    stored.fetch()
    there = {index for index, _ in parts.lines()}
    for row in stored:
        if row.index not in there:
            parts.add(row)
    parts.flush()


def _left(source: PairSource, parts: ResultParts, settings: ScoreSettings, name: str) -> Iterator[Pair]:
    """Yield the pairs without a result. Iterates over pairs and results in parallel.

    Raises:
        ConfigError: a result belongs to another video or prompt, or to other settings.
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
    """Score `count` pairs and add their results to `parts`.

    Returns:
        The number of scored frames, and seconds by stage and backend.
    """
    with connected(options.cluster.address):
        workers, gpus = sized(options.cluster)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ledger = make_ledger()
        at_once = max(1, min(_MOST_AT_ONCE, count // (workers * _TURNS)))
        tables: list[Any] = [ray.put(table) for table in _tables(pairs, at_once, str(settings), parts)]
        workers = max(1, min(workers, len(tables)))
        scored = score_dataset(
            ray.data.from_arrow_refs(tables),
            settings,
            workers=workers,
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
                bar.describe(f"workers: {workers}")
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
    """Yield the pairs as tables of `at_once` rows; pairs that are not UTF-8 become error rows of `parts`."""
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
        return f"{pair.video}: a name or prompt is not valid UTF-8, which Ray requires: score this video without --ray"
    return ""


def _failed(pair: Pair, error: str, settings: str) -> VideoScore:
    values: dict[str, Any] = {"index": pair.index, "video": pair.video, "reference": pair.reference}
    return VideoScore(**values, prompt=pair.prompt, status="error", error=error, settings=settings)


def _plain(error: RayError) -> FrostlineError:
    """Return the last line of a Ray error, which states the cause."""
    log.debug("Ray reported an error", exc_info=error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return FrostlineError(f"the workers failed: {lines[-1].strip() if lines else type(error).__name__}")


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
