"""What the scores of many videos come to: statistics, and a decision where a threshold is published."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable, Mapping, Sequence
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

    def mean_of(self, column: str = FACE_SCORE) -> float | None:
        """Return the mean of a column over the videos that were scored, in which one without a face counts as 0.

        None if no video has this score.
        """
        if column != FACE_SCORE:
            statistics_ = self.scores.get(column)
            return None if statistics_ is None else statistics_.mean
        if not self.with_faces:
            return None
        return (self.mean or 0.0) * (self.with_faces - self.without_face) / self.with_faces

    def reaches(self, bar: float, column: str = FACE_SCORE) -> bool:
        """Whether the mean over the videos that were scored is at least `bar`; one without a face counts as 0."""
        mean = self.mean_of(column)
        return mean is not None and mean >= bar

    def json_values(self) -> dict[str, Any]:
        """As plain values; without what was not scored."""
        values = asdict(self)
        if not self.scores:
            del values["scores"]
        elif not self.with_faces:
            values = {name: value for name, value in values.items() if name not in _OF_FACES}
        return values


def summarize(
    rows: Iterable[VideoScore],
    seconds: float = 0.0,
    new_frames: int = 0,
    stage_seconds: Mapping[str, float] | None = None,
    labels: Sequence[str] = (),
) -> Summary:
    """Summarise rows, of which only their numbers are kept.

    Args:
        labels: of the rewards but `face_identity`, which are listed without a score too.
        seconds: that the run took; new_frames: that it scored in them, references included.
    """
    videos = failed = frames = without_face = 0
    scores, rates, as_zero = array("d"), array("d"), array("d")
    columns: dict[str, array[float]] = {label: array("d") for label in labels}
    for row in rows:
        videos += 1
        if row.status != "ok":
            failed += 1
            continue
        frames += row.frames or 0
        without_face += row.face_score is None and row.detection_rate is not None
        for found, value in (
            (scores, row.face_score),
            (rates, row.detection_rate),
            (as_zero, row.face_score_missing_zero),
        ):
            if value is not None:
                found.append(value)
        for name, value in row.scores.items():
            columns.setdefault(name, array("d")).append(value)
    faces = ScoreStatistics.of(scores)
    return Summary(
        videos=videos,
        failed=failed,
        with_faces=len(rates),
        without_face=without_face,
        frames=frames,
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
        scores={name: ScoreStatistics.of(values) for name, values in columns.items()},
    )


@dataclass(frozen=True)
class Threshold:
    """The cosine from which two faces count as one person, and who says so."""

    cosine: float
    embedder: str
    source: str


# By the name of an embedder in results. Others have no threshold that their authors published for cosines.
THRESHOLDS: Mapping[str, Threshold] = {
    "sface": Threshold(0.363, "SFace", "OpenCV Zoo, models/face_recognition_sface/sface.py"),
}


@dataclass(frozen=True)
class Decision:
    """How many of the videos that were scored show the person of their reference. without_face: that show nobody."""

    same_person: int
    videos: int
    without_face: int
    threshold: Threshold

    @property
    def sentence(self) -> str:
        """The decision in words, with threshold and source."""
        videos = f"{self.videos} video" if self.videos == 1 else f"{self.videos} videos"
        nobody = f"; {self.without_face} without any face" if self.without_face else ""
        return (
            f"the same person in {self.same_person} of {videos}{nobody} (mean cosine of at least "
            f"{self.threshold.cosine:g}: the threshold of {self.threshold.embedder} for two pictures in "
            f"{self.threshold.source})"
        )

    def json_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def decide(rows: Iterable[VideoScore]) -> Decision | None:
    """Compare the face score of each video with the threshold of the embedder.

    Returns:
        None where no face was compared, or not by one embedder with a published threshold.
    """
    compared, scores, embedders = 0, array("d"), set[str]()
    for row in rows:
        if row.status == "ok" and row.detection_rate is not None:
            compared += 1
            embedders.add(row.face_embedder)
            if row.face_score is not None:
                scores.append(row.face_score)
    if len(embedders) != 1 or (threshold := THRESHOLDS.get(embedders.pop())) is None:
        return None
    same = sum(score >= threshold.cosine for score in scores)
    return Decision(same, compared, compared - len(scores), threshold)


def _histogram(scores: Sequence[float]) -> tuple[int, ...]:
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    for score in scores:
        place = sum(score >= edge for edge in HISTOGRAM_EDGES) - 1
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return tuple(counts)
