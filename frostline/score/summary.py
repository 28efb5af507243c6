"""Summarise the scores of many videos, and compare face scores with a published threshold."""

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
"""The edges of the 20 bins of the histogram; a score of 1 is in the last bin."""


@dataclass(frozen=True)
class ScoreStatistics:
    """Statistics of one score column.

    Attributes:
        videos: the number of videos with a value; if it is 0, all other attributes are None.
    """

    videos: int
    mean: float | None
    median: float | None
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> ScoreStatistics:
        """Compute the statistics of these values."""
        mean = statistics.fmean(values) if values else None
        median = statistics.median(values) if values else None
        return cls(len(values), mean, median, min(values, default=None), max(values, default=None))


@dataclass(frozen=True)
class Summary:
    """Statistics of a run.

    `mean`, `median`, `lowest` and `highest` are None if no video has a face score; `mean_missing_zero` and
    `detection_rate` are None if `with_faces` is 0.

    Attributes:
        videos: the number of videos.
        failed: the number of videos that could not be scored.
        with_faces: the number of videos that were scored by `face_identity`, with or without a face.
        without_face: the number of those videos in which no face was found.
        frames: the number of scored frames.
        mean, median, lowest, highest: statistics of `face_score`.
        mean_missing_zero: the mean of `face_score_missing_zero`.
        detection_rate: the mean over the videos.
        histogram: the number of videos per bin of `HISTOGRAM_EDGES`.
        seconds: the duration of this run.
        frames_per_second: the throughput of this run.
        stage_seconds: seconds by stage and backend.
        scores: statistics of the other rewards and their metrics, by column.
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
        """Return the mean of a column over the scored videos; None if no video has this score.

        In `face_score`, videos without a face count as 0.
        """
        if column != FACE_SCORE:
            statistics_ = self.scores.get(column)
            return None if statistics_ is None else statistics_.mean
        if not self.with_faces:
            return None
        return (self.mean or 0.0) * (self.with_faces - self.without_face) / self.with_faces

    def reaches(self, bar: float, column: str = FACE_SCORE) -> bool:
        """Return whether `mean_of(column)` is at least `bar`."""
        mean = self.mean_of(column)
        return mean is not None and mean >= bar

    def json_values(self) -> dict[str, Any]:
        """Return the summary as JSON values, without the keys of rewards that were not used."""
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
    """Compute the summary of rows. Only scores are kept in memory.

    Args:
        rows: the rows of all videos.
        seconds: the duration of the run.
        new_frames: the number of frames that were scored in this time, including those of references.
        stage_seconds: seconds by stage and backend.
        labels: the labels of the rewards except `face_identity`; they are listed even if no video has a score.
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
    """The minimum cosine similarity at which two faces count as the same person, and its source."""

    cosine: float
    embedder: str
    source: str


# By embedder name in results. The authors of the other embedders have not published a threshold for cosines.
THRESHOLDS: Mapping[str, Threshold] = {
    "sface": Threshold(0.363, "SFace", "OpenCV Zoo, models/face_recognition_sface/sface.py"),
}


@dataclass(frozen=True)
class Decision:
    """The comparison of face scores with a threshold.

    Attributes:
        same_person: the number of videos that show the person of their reference.
        videos: the number of compared videos.
        without_face: the number of compared videos in which no face was found.
        threshold: the threshold of the embedder.
    """

    same_person: int
    videos: int
    without_face: int
    threshold: Threshold

    @property
    def sentence(self) -> str:
        """Return the decision as a sentence with threshold and source."""
        videos = f"{self.videos} video" if self.videos == 1 else f"{self.videos} videos"
        nobody = f"; {self.without_face} without any face" if self.without_face else ""
        return (
            f"the same person in {self.same_person} of {videos}{nobody} (mean cosine of at least "
            f"{self.threshold.cosine:g}: the threshold of {self.threshold.embedder} for two pictures in "
            f"{self.threshold.source})"
        )

    def json_values(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return asdict(self)


def decide(rows: Iterable[VideoScore]) -> Decision | None:
    """Compare the face score of each video with the threshold of the embedder.

    Returns:
        The decision; None if `face_identity` scored no video, several embedders were used, or the embedder has no
        published threshold.
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
