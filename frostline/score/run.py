"""Run scoring: find the pairs without a result, divide them over processes, and write one results file in order."""

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


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of a run, in this process or on a cluster, that do not change the results.

    Attributes:
        resume: keep the results in `out`, and score the remaining pairs.
        overwrite: replace the results in `out`.
        backend: `auto`, `torch` or the name of a backend.
        device: `cpu`, `cuda`, … or `auto`.
        engines: the folder of the engine store.
        batch: the number of frames per batch; see `Scorer`.
        downloads: limits for videos at URLs.
    """

    resume: bool = False
    overwrite: bool = False
    backend: str = "auto"
    device: str = "auto"
    engines: Path = Path("engines")
    batch: int = 32
    downloads: DownloadLimits = DEFAULT_LIMITS


@dataclass(frozen=True, kw_only=True)
class RunOptions(ScoringOptions):
    """Options of a run in this process.

    Attributes:
        out: the results file, `.jsonl` or `.csv`; None to keep the results in memory only.
    """

    out: Path | None = None


@dataclass(frozen=True)
class ScoreOutcome:
    """The result of a run.

    Attributes:
        rows: all rows in the order of the input.
        summary: statistics of the rows.
        labels: the score columns in the order of the rewards.
    """

    rows: Sequence[VideoScore]
    summary: Summary
    labels: tuple[str, ...] = (FACE_SCORE,)

    def shortfall(self, bar: float, column: str = "") -> str | None:
        """Return an error message if the mean of a column is missing or below `bar`; otherwise None.

        Args:
            bar: the minimum mean.
            column: the score column; if empty, the one of the first reward. In `face_score`, videos without a face
                count as 0.
        Raises:
            ConfigError: the column does not exist.
        """
        column = column or self.labels[0]
        if column not in (known := (*self.labels, *self.summary.scores)):
            raise ConfigError(f"--fail-under: unknown score {column!r}: use one of {', '.join(dict.fromkeys(known))}")
        if self.summary.reaches(bar, column):
            return None
        mean = self.summary.mean_of(column)
        if mean is None:
            return f"no video has a {column}, but its mean must be at least {bar:g} (--fail-under)"
        without = self.summary.without_face if column == FACE_SCORE else 0
        counted = f"; {without} of {self.summary.videos} videos show no face and count as 0" if without else ""
        return f"the mean {column} is {_below(mean, bar)}, but must be at least {bar:g} (--fail-under){counted}"

    def json_values(self) -> dict[str, Any]:
        """Return rows, summary and decision as JSON values."""
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
    """The progress of a run.

    Attributes:
        start: the start time, in seconds of the monotonic clock.
        frames: the number of scored frames, including those of references.
        stages: seconds by stage and backend.
    """

    start: float = field(default_factory=time.monotonic)
    frames: int = 0
    stages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def run_score(
    pairs: Sequence[Pair], settings: ScoreSettings, options: RunOptions, progress: Progress
) -> ScoreOutcome | None:
    """Score `pairs`; with several processes, each process scores its share.

    Returns:
        The outcome in the main process, and None in all others.
    Raises:
        ConfigError: the options contradict each other, `out` already exists, the results to resume belong to other
            videos, prompts or settings, a reward cannot be loaded, or the common reference cannot be read.
        DataError: the results file cannot be read or written.
        EngineError: the requested engines cannot be built.
    """
    check_backend(options.backend)
    needs, labels = settings.needs(), settings.labels()
    file = None if options.out is None else _open_results(options.out, options, labels)
    if needs & COMPARES:
        _check_reference(pairs)
    processes = Processes.join(options.device)
    if processes.count > 1 and file is None:
        raise ConfigError("several processes need a results file: set --out")
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
    """Return the path of the summary of a results file."""
    return out.with_suffix(".summary.json")


def _open_results(out: Path, options: RunOptions, labels: Sequence[str]) -> ResultFile:
    """Return the results file; an existing one needs `resume` or `overwrite`."""
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: use only one of them")
    file = ResultFile(out, [label for label in labels if label != FACE_SCORE], FACE_SCORE in labels)
    if out.exists() and not (options.resume or options.overwrite):
        raise ConfigError(f"{out} already exists: use --resume to continue, or --overwrite to replace it")
    check_writable(out)
    return file


def _check_reference(pairs: Sequence[Pair]) -> None:
    """Check a reference that all videos share, so that an error is reported once."""
    if len({pair.reference for pair in pairs}) > 1 or pairs[0].fault or pairs[0].reference == pairs[0].video:
        return
    if is_url(pairs[0].reference):
        return
    try:
        probe_video(pairs[0].reference)
    except DataError as error:
        raise ConfigError(f"the reference {error}") from error


def _scored(pairs: Sequence[Pair], scorer: Scorer, progress: Progress, clock: _Clock) -> Iterator[VideoScore]:
    """Yield the results of `pairs`, and show a progress bar with videos and frames per second."""
    with progress.bar("score", len(pairs)) as bar, ExitStack() as stack:
        times = {reward: stack.enter_context(reward.runtime.clock.collect()) for reward in scorer.rewards}
        for row in scorer.score(pairs, _watch(times, clock, bar)):
            yield row
            bar.advance(1)


def _watch(times: Mapping[ScoredReward, StageTimes], clock: _Clock, bar: Bar) -> Callable[[int], None]:
    """Return a callback that adds new frames and the stage times to `clock`, and shows the throughput on `bar`."""
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
    """Write each result to a file as soon as it is available, and return all rows in order in the main process.

    A single process without gaps in its earlier results appends to the results file. Otherwise each process appends to
    its own part file in the same folder, and the main process merges the parts.
    """
    known = [done[index] for index in sorted(done)]
    if file is None:
        return known + list(fresh)
    # All processes must have read the earlier results before the file is rewritten.
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
    """Return the rows of an earlier run by index.

    Args:
        file: the results file.
        pairs: the pairs of this run.
        settings: the settings of this run.
        by_prompt: whether scores depend on prompts.
    Raises:
        ConfigError: the rows belong to other videos, prompts or settings.
    """
    done = {row.index: row for row in (*file.read(), *_rows_of_parts(file))}
    by_index = {pair.index: pair for pair in pairs}
    for row in done.values():
        check_same(row, by_index.get(row.index), str(settings), by_prompt, str(file.path))
    return done


def check_same(row: VideoScore, pair: Pair | None, settings: str, by_prompt: bool, name: str) -> None:
    """Check that a row of an earlier run matches this run.

    Args:
        row: the row.
        pair: the pair with the same index; None if there is none.
        settings: the settings of this run.
        by_prompt: whether scores depend on prompts.
        name: the name of the results file for error messages.
    Raises:
        ConfigError: the row belongs to another video or prompt, or to other settings.
    """
    if pair is None or not _is_of(row, pair):
        raise ConfigError(f"{name} contains results of other videos ({row.video}): use --overwrite to replace them")
    if by_prompt and one_line(row.prompt) != one_line(pair.prompt):
        raise ConfigError(
            f"{name} contains results of other prompts ({row.prompt!r} of {row.video}, now {pair.prompt!r}): "
            "use --overwrite to replace them"
        )
    if row.settings != settings:
        raise ConfigError(
            f"{name} contains results of other settings ({row.settings}, now {settings}): "
            "use --overwrite to replace them"
        )


def _is_of(row: VideoScore, pair: Pair) -> bool:
    # In CSV files, newlines of a name become spaces.
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
    """Return a mean with at least three digits, and as many as are needed to be less than `bar` after rounding."""
    texts = (f"{mean:.{digits}f}" for digits in range(3, 17))
    return next((text for text in texts if float(text) < bar), repr(mean))
