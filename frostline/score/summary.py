"""What the scores of many videos come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from frostline.score.result import FACE_SCORE, VideoScore

_OF_FACES = (
    *("with_faces", "without_face", "mean", "median", "lowest", "highest", "mean_missing_zero", "detection_rate"),
    "histogram",
)
HISTOGRAM_EDGES = tuple(round(-1 + 0.1 * step, 1) for step in range(21))
"""Borders of the histogram's 20 bins; a score of 1 falls into the last."""


@dataclass(frozen=True)
class ScoreStatistics:
    """Of one column of scores. videos: that have a value; without any, the others are None."""

    videos: int
    mean: float | None
    median: float | None
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> ScoreStatistics:
        """Those of these values."""
        mean = statistics.fmean(values) if values else None
        median = statistics.median(values) if values else None
        return cls(len(values), mean, median, min(values, default=None), max(values, default=None))


@dataclass(frozen=True)
class Summary:
    """Of the videos that could be scored; None where there is none with a face.

    failed: videos that could not be scored. with_faces: those whose faces were compared with a reference's.
    without_face: of these, videos in which no face was found.
    mean, median, lowest, highest: of `face_score`. histogram: videos by face score, see `HISTOGRAM_EDGES`.
    detection_rate: mean over the videos. seconds: of this run. stage_seconds: of each stage, by name and backend.
    scores: of the other rewards and their metrics, by column.
    """

    videos: int
    failed: int
    with_faces: int
    without_face: int
    frames: int
    mean: float | None
    median: float | None
    lowest: float | None
    highest: float | None
    mean_missing_zero: float | None
    detection_rate: float | None
    histogram: tuple[int, ...]
    seconds: float = 0.0
    frames_per_second: float | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, ScoreStatistics] = field(default_factory=dict)

    def reaches(self, bar: float, column: str = FACE_SCORE) -> bool:
        """Whether the mean over the videos that were scored is at least `bar`; one without a face counts as 0."""
        if column != FACE_SCORE:
            statistics_ = self.scores.get(column)
            return statistics_ is not None and statistics_.mean is not None and statistics_.mean >= bar
        if not self.with_faces:
            return False
        return (self.mean or 0.0) * (self.with_faces - self.without_face) / self.with_faces >= bar

    def json_values(self) -> dict[str, Any]:
        """As plain values; without what was not scored."""
        values = asdict(self)
        if not self.scores:
            del values["scores"]
        elif not self.with_faces:
            values = {name: value for name, value in values.items() if name not in _OF_FACES}
        return values


def summarize(
    rows: Sequence[VideoScore],
    seconds: float = 0.0,
    new_frames: int = 0,
    stage_seconds: Mapping[str, float] | None = None,
    labels: Sequence[str] = (),
) -> Summary:
    """The summary of these rows.

    Args:
        labels: of the rewards but `face_identity`, which are listed without a score too.
        seconds: that the run took; new_frames: that it scored in them, references included.
    """
    ok = [row for row in rows if row.status == "ok"]
    scores = [row.face_score for row in ok if row.face_score is not None]
    rates = [row.detection_rate for row in ok if row.detection_rate is not None]
    columns = dict.fromkeys((*labels, *(name for row in ok for name in row.scores)))
    as_zero = [row.face_score_missing_zero for row in ok if row.face_score_missing_zero is not None]
    faces = ScoreStatistics.of(scores)
    return Summary(
        videos=len(rows),
        failed=len(rows) - len(ok),
        with_faces=len(rates),
        without_face=sum(row.face_score is None and row.detection_rate is not None for row in ok),
        frames=sum(row.frames or 0 for row in ok),
        mean=faces.mean,
        median=faces.median,
        lowest=faces.lowest,
        highest=faces.highest,
        mean_missing_zero=statistics.fmean(as_zero) if as_zero else None,
        detection_rate=statistics.fmean(rates) if rates else None,
        histogram=_histogram(scores),
        seconds=seconds,
        frames_per_second=new_frames / seconds if seconds and new_frames else None,
        stage_seconds=dict(stage_seconds or {}),
        scores={name: ScoreStatistics.of([row.scores[name] for row in ok if name in row.scores]) for name in columns},
    )


def _histogram(scores: Sequence[float]) -> tuple[int, ...]:
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    for score in scores:
        place = sum(score >= edge for edge in HISTOGRAM_EDGES) - 1
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return tuple(counts)
