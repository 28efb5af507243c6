"""What the scores of many videos come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from frostline.score.result import VideoScore

HISTOGRAM_EDGES = tuple(round(-1 + 0.1 * step, 1) for step in range(21))
"""Borders of the histogram's 20 bins; a score of 1 falls into the last."""


@dataclass(frozen=True)
class Summary:
    """Of the videos that could be scored; None where there is none with a face.

    failed: videos that could not be scored. without_face: scored videos in which no face was found.
    mean, median, lowest, highest: of `face_score`. histogram: videos by face score, see `HISTOGRAM_EDGES`.
    detection_rate: mean over the videos. seconds: of this run. stage_seconds: of each stage, by name and backend.
    """

    videos: int
    failed: int
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

    def reaches(self, bar: float) -> bool:
        """Whether the mean over all scored videos, one without a face counting 0, is at least `bar`."""
        scored = self.videos - self.failed
        if not scored:
            return False
        return (self.mean or 0.0) * (scored - self.without_face) / scored >= bar


def summarize(
    rows: Sequence[VideoScore],
    seconds: float = 0.0,
    new_frames: int = 0,
    stage_seconds: Mapping[str, float] | None = None,
) -> Summary:
    """The summary of these rows.

    Args:
        seconds: that the run took; new_frames: that it scored in them, references included.
    """
    ok = [row for row in rows if row.status == "ok"]
    scores = [row.face_score for row in ok if row.face_score is not None]
    rates = [row.detection_rate for row in ok if row.detection_rate is not None]
    as_zero = [row.face_score_missing_zero for row in ok if row.face_score_missing_zero is not None]
    return Summary(
        videos=len(rows),
        failed=len(rows) - len(ok),
        without_face=sum(row.face_score is None for row in ok),
        frames=sum(row.frames or 0 for row in ok),
        mean=statistics.fmean(scores) if scores else None,
        median=statistics.median(scores) if scores else None,
        lowest=min(scores, default=None),
        highest=max(scores, default=None),
        mean_missing_zero=statistics.fmean(as_zero) if as_zero else None,
        detection_rate=statistics.fmean(rates) if rates else None,
        histogram=_histogram(scores),
        seconds=seconds,
        frames_per_second=new_frames / seconds if seconds and new_frames else None,
        stage_seconds=dict(stage_seconds or {}),
    )


def _histogram(scores: Sequence[float]) -> tuple[int, ...]:
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    for score in scores:
        place = sum(score >= edge for edge in HISTOGRAM_EDGES) - 1
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return tuple(counts)
