"""A scoring run: what is done already, what is left, who does it, and one file of results in the order of the input."""

from __future__ import annotations

import glob
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline.atomic_io import atomic_write, check_writable
from frostline.errors import ConfigError, DataError
from frostline.paths import is_url
from frostline.progress import Bar, Progress
from frostline.rewards.inputs import COMPARES
from frostline.runtime.stage_timer import StageTimes
from frostline.score.files import ResultFile
from frostline.score.processes import Processes
from frostline.score.request import Pair
from frostline.score.result import FACE_SCORE, VideoScore, columns, one_line
from frostline.score.rewards.base import ScoredReward
from frostline.score.rewards.loading import check_backend, load_rewards
from frostline.score.scorer import Scorer
from frostline.score.settings import ScoreSettings
from frostline.score.summary import Summary, decide, summarize
from frostline.video import probe_video
from frostline.video.downloads import DEFAULT_LIMITS, DownloadLimits

Done = Mapping[int, VideoScore]


@dataclass(frozen=True)
class RunOptions:
    """How to run, on which the results do not depend.

    out: `.jsonl` or `.csv`; None keeps the results in memory. resume: keep the results that are there. overwrite: let
    others take their place. batch: frames that a reward looks at in one call. downloads: limits of videos at URLs.
    """

    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    backend: str = "auto"
    device: str = "auto"
    engines: Path = Path("engines")
    batch: int = 32
    downloads: DownloadLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class ScoreOutcome:
    """All rows in the order of the input, and what they come to.

    labels: columns of the scores, that of the first reward first.
    """

    rows: Sequence[VideoScore]
    summary: Summary
    labels: tuple[str, ...] = (FACE_SCORE,)

    def shortfall(self, bar: float, column: str = "") -> str | None:
        """Return what is wrong, in words, if the mean of a column is below `bar` or missing; None if nothing is.

        Args:
            column: that of the first reward if it is empty. A video without a face counts as 0.
        Raises:
            ConfigError: there is no such column.
        """
        column = column or self.labels[0]
        if column not in (known := (*self.labels, *self.summary.scores)):
            raise ConfigError(
                f"--fail-under: there is no score {column!r}, there are {', '.join(dict.fromkeys(known))}"
            )
        if self.summary.reaches(bar, column):
            return None
        mean = self.summary.mean_of(column)
        if mean is None:
            return f"no video has a {column}, of which the mean must be at least {bar:g} (--fail-under)"
        without = self.summary.without_face if column == FACE_SCORE else 0
        counted = f"; {without} of {self.summary.videos} videos show no face and count as 0" if without else ""
        return f"the mean {column} is {_below(mean, bar)}, and must be at least {bar:g} (--fail-under){counted}"

    def json_values(self) -> dict[str, Any]:
        """Return rows, summary and decision as plain values."""
        names = columns([label for label in self._score_names() if label != FACE_SCORE], FACE_SCORE in self.labels)
        decision = decide(self.rows)
        return {
            "rows": [row.plain(names) for row in self.rows],
            "summary": self.summary.json_values(),
            "decision": None if decision is None else decision.json_values(),
        }

    def _score_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.labels, *self.summary.scores)))


@dataclass
class _Clock:
    """What a run has done so far. frames: scored, references included. stages: seconds by stage and backend."""

    start: float = field(default_factory=time.monotonic)
    frames: int = 0
    stages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def run_score(
    pairs: Sequence[Pair], settings: ScoreSettings, options: RunOptions, progress: Progress
) -> ScoreOutcome | None:
    """Score `pairs`, all of them or, where a launcher started several processes, this one's share.

    Raises:
        ConfigError: the options contradict each other, `out` is there already, the results to go on from are of other
            videos or settings, a reward cannot be had, or the reference of all videos cannot be read.
        DataError: the file of results cannot be read or written.
        EngineError: the engines that were asked for cannot be built.
    """
    check_backend(options.backend)
    needs, labels = settings.needs(), settings.labels()
    file = None if options.out is None else _open_results(options.out, options, labels)
    if needs & COMPARES:
        _check_reference(pairs)
    processes = Processes.join(options.device)
    if processes.count > 1 and file is None:
        raise ConfigError("several processes need --out, where their results come together")
    if not processes.is_main:
        progress = Progress(quiet=True)
    done = _finished(file, pairs, settings, "prompt" in needs) if file is not None and options.resume else {}
    with progress.task("load the networks") as task:
        rewards = load_rewards(
            settings, options.backend, options.engines, processes.device, options.batch, task.describe
        )
    clock = _Clock()
    left = processes.share([pair for pair in pairs if pair.index not in done])
    scorer = Scorer(rewards, settings, options.batch, options.downloads)
    fresh = _scored(left, scorer, progress, clock)
    rows = _collect(fresh, done, file, len(pairs), processes)
    if not processes.is_main:
        return None
    summary = summarize(
        rows, clock.seconds, clock.frames, clock.stages, [label for label in labels if label != FACE_SCORE]
    )
    if file is not None:
        _write_summary(file.path, summary)
    return ScoreOutcome(tuple(rows), summary, labels)


def summary_path(out: Path) -> Path:
    """Where the summary of the results in `out` lies."""
    return out.with_suffix(".summary.json")


def _open_results(out: Path, options: RunOptions, labels: Sequence[str]) -> ResultFile:
    """The file of results, in which there may be some only if the options say what becomes of them."""
    if options.resume and options.overwrite:
        raise ConfigError("--resume keeps the results in --out, --overwrite does not: give one of them")
    file = ResultFile(out, [label for label in labels if label != FACE_SCORE], FACE_SCORE in labels)
    if out.exists() and not (options.resume or options.overwrite):
        raise ConfigError(f"{out} is there already: go on from its results (--resume), or replace it (--overwrite)")
    check_writable(out)
    return file


def _check_reference(pairs: Sequence[Pair]) -> None:
    """Say once what every video would fail with."""
    if len({pair.reference for pair in pairs}) > 1 or pairs[0].fault or pairs[0].reference == pairs[0].video:
        return
    if is_url(pairs[0].reference):
        return
    try:
        probe_video(pairs[0].reference)
    except DataError as error:
        raise ConfigError(f"the reference {error}") from error


def _scored(pairs: Sequence[Pair], scorer: Scorer, progress: Progress, clock: _Clock) -> Iterator[VideoScore]:
    """The results of `pairs`, with a bar that tells videos and frames per second."""
    with progress.bar("score", len(pairs)) as bar, ExitStack() as stack:
        times = {reward: stack.enter_context(reward.runtime.clock.collect()) for reward in scorer.rewards}
        for row in scorer.score(pairs, _watch(times, clock, bar)):
            yield row
            bar.advance(1)


def _watch(times: Mapping[ScoredReward, StageTimes], clock: _Clock, bar: Bar) -> Callable[[int], None]:
    owners = Counter(name for reward in times for name in reward.active.stage_names)

    def on_frames(frames: int) -> None:
        clock.frames += frames
        for reward, of_reward in times.items():
            for name, spent in of_reward.read().items():
                stage = name if owners[name] == 1 else f"{reward.label}.{name}"
                clock.stages[f"{stage} ({spent.backend})"] += spent.milliseconds / 1000
        bar.describe(f"{clock.frames / clock.seconds:.1f} frames/s")

    return on_frames


def _collect(
    fresh: Iterator[VideoScore], done: Done, file: ResultFile | None, count: int, processes: Processes
) -> list[VideoScore]:
    """All rows in order, in the main process; every one is in a file as soon as it is known.

    One process that starts at some row appends to the file of results. Several, or one that fills gaps, append to a
    part each beside it, and the main process joins the parts.
    """
    known = [done[index] for index in sorted(done)]
    if file is None:
        return known + list(fresh)
    # All have read what an earlier run left.
    processes.wait()
    if processes.is_main:
        file.rewrite(known)
        for part in _parts(file):
            part.unlink()
    processes.wait()
    if processes.count == 1 and [row.index for row in known] == list(range(len(known))):
        rows = known
        for row in fresh:
            file.append(row)
            rows.append(row)
        return rows
    name = f".{file.path.name}.{processes.rank}-of-{processes.count}.part.jsonl"
    own = ResultFile(file.path.with_name(name), file.labels, file.faces)
    own.rewrite([])
    for row in fresh:
        own.append(row)
    processes.wait()
    if not processes.is_main:
        return []
    rows = sorted([*known, *_rows_of_parts(file)], key=lambda row: row.index)
    assert [row.index for row in rows] == list(range(count))
    file.rewrite(rows)
    for part in _parts(file):
        part.unlink()
    return rows


def _finished(file: ResultFile, pairs: Sequence[Pair], settings: ScoreSettings, by_prompt: bool) -> Done:
    """The rows that an earlier run left, by index.

    Args:
        by_prompt: whether scores depend on prompts.
    Raises:
        ConfigError: they are of other videos or settings.
    """
    done = {row.index: row for row in (*file.read(), *_rows_of_parts(file))}
    by_index = {pair.index: pair for pair in pairs}
    for row in done.values():
        check_same(row, by_index.get(row.index), str(settings), by_prompt, str(file.path))
    return done


def check_same(row: VideoScore, pair: Pair | None, settings: str, by_prompt: bool, name: str) -> None:
    """Hold a row of an earlier run against what is to be scored now.

    Args:
        pair: that of its index, if there is one. by_prompt: whether scores depend on prompts. name: of the results.
    Raises:
        ConfigError: it is of another video, prompt or settings.
    """
    if pair is None or not _is_of(row, pair):
        raise ConfigError(f"{name} holds results of other videos ({row.video}): --overwrite replaces them")
    if by_prompt and one_line(row.prompt) != one_line(pair.prompt):
        raise ConfigError(
            f"{name} holds results of other prompts ({row.prompt!r} of {row.video}, now {pair.prompt!r}): "
            "--overwrite replaces them"
        )
    if row.settings != settings:
        raise ConfigError(
            f"{name} holds results of other settings ({row.settings}, now {settings}): --overwrite replaces them"
        )


def _is_of(row: VideoScore, pair: Pair) -> bool:
    # In CSV, a name is on one line.
    return (row.video, row.reference) in (
        (pair.video, pair.reference),
        (one_line(pair.video), one_line(pair.reference)),
    )


def _rows_of_parts(file: ResultFile) -> list[VideoScore]:
    return [row for part in _parts(file) for row in ResultFile(part, file.labels, file.faces).read()]


def _parts(file: ResultFile) -> list[Path]:
    return sorted(file.path.parent.glob(f".{glob.escape(file.path.name)}.*-of-*.part.jsonl"))


def _write_summary(out: Path, summary: Summary) -> None:
    with atomic_write(summary_path(out)) as part:
        part.write_text(json.dumps(summary.json_values(), indent=2) + "\n")


def _below(mean: float, bar: float) -> str:
    """A mean with as many digits as tell it from the bar above it, three at least."""
    texts = (f"{mean:.{digits}f}" for digits in range(3, 17))
    return next((text for text in texts if float(text) < bar), repr(mean))
