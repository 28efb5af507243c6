"""Write the report of a scoring run: one HTML page with all scores, curves of frame scores, and the extreme frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from frostline.package_info import installed_versions, processor
from frostline.report.formatting import NONE, fixed
from frostline.report.page import Cell, Column, Figure, Page, Tile
from frostline.report.plots import bar_plot, histogram, line_plot
from frostline.runtime.backends import engine_packages
from frostline.score.pictures import ReferencePictures, extreme_pictures
from frostline.score.report_scores import score_cells, score_distributions, score_tiles
from frostline.score.result import VideoScore
from frostline.score.run import ScoreOutcome
from frostline.score.settings import ScoreSettings
from frostline.score.summary import Summary, decide
from frostline.terminal.tables import shared_folder

_DETAILED = 60
_POINTS = 600
# Bin width of the face score histogram.
_BIN = 0.05
_VIDEO = Column("Video", breaks=True)
_FACE_COLUMNS = (
    Column("Face score", "right"),
    Column("Missing as 0", "right"),
    Column("Faces found", "right"),
    Column("Worst frame", "right"),
)
_COLUMNS = (Column("Frames", "right"), Column("Remark"))


def write_score_report(path: Path, outcome: ScoreOutcome, settings: ScoreSettings) -> None:
    """Write the report. Frame scores are shown for at most 60 videos, those with the lowest face scores.

    Args:
        path: the HTML file to write.
        outcome: the results of the run.
        settings: the settings of the run.
    Raises:
        DataError: the file cannot be written.
    """
    summary, rows = outcome.summary, outcome.rows
    faces = settings.faces
    title = "Is it the same person?" if settings.rewards_are_faces() else "How good are the videos?"
    page = Page(title, _subtitle(rows, settings))
    decision = decide(rows)
    if decision is not None:
        page.paragraph(f"{decision.sentence[:1].upper()}{decision.sentence[1:]}.", lead=True)
    page.paragraph(_outcome(summary, faces is not None), lead=decision is None)
    pictures = None if faces is None else ReferencePictures(faces)
    references = {row.reference for row in rows}
    if pictures is not None and len(references) == 1:
        _show_reference(page, pictures, references.pop())
    page.tiles([*(_face_tiles(summary) if faces else ()), *score_tiles(summary), *_tiles(summary)])
    page.heading("All scores")
    folder = shared_folder([row.video for row in rows])
    if folder:
        page.paragraph(f"Videos in {folder}")
    page.figures(*(_face_distribution(summary, rows) if faces else ()), *score_distributions(summary, rows), columns=2)
    scores = tuple(summary.scores)
    columns = [_VIDEO, *(_FACE_COLUMNS if faces else ()), *(Column(name, "right") for name in scores), *_COLUMNS]
    page.table(
        columns, [_row(row, scores, faces is not None, folder) for row in rows], caption=_FACE_CAPTION if faces else ""
    )
    if pictures is not None:
        _frames(page, rows, settings, folder, pictures)
    page.heading("The run")
    if summary.stage_seconds:
        seconds = {name: {"seconds": spent} for name, spent in summary.stage_seconds.items()}
        page.figures(Figure.svg(bar_plot(seconds, unit="s"), "Seconds per stage", "Time per stage"), columns=2)
    page.facts(_facts(outcome, settings))
    page.write(path)


_FACE_CAPTION = (
    "Face score is the mean cosine similarity between the face in each frame and the faces of the reference, over the "
    "frames with a face; if missing_face is zero, it equals Missing as 0. Missing as 0 is the mean over all frames, "
    "with 0 for frames without a face. Click a heading to sort."
)


def _subtitle(rows: Sequence[VideoScore], settings: ScoreSettings) -> str:
    references, text = {row.reference for row in rows}, _count(len(rows), "video")
    if len(references) > 1:
        text += ", each against its reference"
    elif reference := next(iter(references)):
        text += f" against {Path(reference).name}"
    if settings.faces is None:
        return f"{text} · {', '.join(entry.type for entry in settings.rewards)}"
    return f"{text} · {settings.faces.detector.partition(':')[0]} and {rows[0].face_embedder}"


def _outcome(summary: Summary, faces: bool) -> str:
    if not faces:
        scored = [f"{name} is {of.mean:.3f}" for name, of in summary.scores.items() if of.mean is not None]
        text = f"The mean of {', of '.join(scored)}." if scored else "No video has a score."
        return f"{text} {_count(summary.failed, 'video')} could not be scored." if summary.failed else text
    if summary.mean is None or summary.median is None:
        return "No video has a face score." if summary.scores else "No video has a score."
    text = f"The mean face score is {summary.mean:.3f}, the median {summary.median:.3f}."
    if summary.detection_rate is not None:
        text += f" On average, a face was found in {100 * summary.detection_rate:.1f} % of the frames of a video."
    if summary.failed:
        text += f" {_count(summary.failed, 'video')} could not be scored."
    return text


def _face_tiles(summary: Summary) -> list[Tile]:
    rate = None if summary.detection_rate is None else 100 * summary.detection_rate
    return [
        Tile(
            "Face score, mean",
            fixed(summary.mean, 3),
            note="1 means the same picture; another person has about 0.14 with sface, and 0.85 with dlib.",
        ),
        Tile(
            "Missing faces as 0",
            fixed(summary.mean_missing_zero, 3),
            note="The mean over all frames, with 0 for frames without a face: hiding the face does not raise it.",
        ),
        Tile(
            "Detection rate",
            fixed(rate, 1),
            unit="%",
            note="Share of the frames in which a face was found, averaged over the videos.",
        ),
        Tile("Lowest and highest", fixed(summary.lowest, 3), unit=f"to {fixed(summary.highest, 3)}"),
    ]


def _show_reference(page: Page, pictures: ReferencePictures, reference: str) -> None:
    picture = pictures.face(reference)
    if picture is not None:
        name = Path(reference).name
        page.figures(Figure.jpeg(picture, f"The face of {name}", f"The reference: {name}"), columns=5, narrow_columns=2)


def _tiles(summary: Summary) -> list[Tile]:
    return [Tile("Videos scored", str(summary.videos - summary.failed), unit=f"of {summary.videos}")]


def _face_distribution(summary: Summary, rows: Sequence[VideoScore]) -> list[Figure]:
    scores = [row.face_score for row in rows if row.face_score is not None]
    frames = [score for row in rows for score in row.frame_scores or () if score is not None]
    # The axis is from 0 to 1 in all reports, so that they can be compared; it is extended for cosines below 0.
    low = min(0.0, math.floor(5 * min([*scores, *frames], default=0.0)) / 5)
    bins, decision = round((1 - low) / _BIN), decide(rows)
    marks = {} if decision is None else {"threshold": decision.threshold.cosine}
    return [
        Figure.svg(
            histogram(scores, bins, xlabel="face score", ylabel="videos", marks=marks, x_range=(low, 1.0)),
            alt="Number of videos by face score",
            title="Videos by face score",
            caption=f"Mean {fixed(summary.mean, 3)}, median {fixed(summary.median, 3)}.",
        ),
        Figure.svg(
            histogram(frames, bins, xlabel="score of a frame", ylabel="frames", x_range=(low, 1.0)),
            alt="Number of frames by score",
            title="Frames by score",
        ),
    ]


def _row(row: VideoScore, scores: Sequence[str], faces: bool, folder: str) -> list[str | Cell]:
    remark = row.error.removeprefix(f"{row.video}: ") or row.note
    if row.status == "ok" and row.face_score is None and row.detection_rate is not None:
        remark = f"no face was found. {remark}".strip()
    return [
        row.video.removeprefix(folder),
        *(_face_cells(row) if faces else ()),
        *score_cells(row, scores),
        NONE if row.frames is None else str(row.frames),
        Cell(remark, muted=True),
    ]


def _face_cells(row: VideoScore) -> list[Cell]:
    rate = NONE if row.detection_rate is None else f"{100 * row.detection_rate:.1f} %"
    return [
        Cell(fixed(row.face_score, 3), row.face_score),
        Cell(fixed(row.face_score_missing_zero, 3), row.face_score_missing_zero),
        Cell(rate, row.detection_rate),
        _extreme(row.worst_frame, row.worst_frame_score),
    ]


def _extreme(frame: int | None, score: float | None) -> Cell:
    return Cell(NONE if score is None else f"{fixed(score, 3)} at {frame}", score)


def _frames(
    page: Page, rows: Sequence[VideoScore], settings: ScoreSettings, folder: str, references: ReferencePictures
) -> None:
    scored = [row for row in rows if row.frame_scores and row.status == "ok"]
    if not scored:
        return
    page.heading("Frame by frame")
    lowest = sorted(scored, key=lambda row: -2.0 if row.face_score is None else row.face_score)[:_DETAILED]
    if len(scored) > len(lowest):
        page.paragraph(f"The {len(lowest)} videos with the lowest scores, of {len(scored)}.")
    page.paragraph(
        "A curve has a gap where no face was found. Next to it are the frames with the lowest and the highest score, "
        "cropped to the face, with the box and the landmarks that were used to align the face."
    )
    several = len({row.reference for row in rows}) > 1
    for row in lowest if len(scored) > len(lowest) else scored:
        page.subheading(row.video.removeprefix(folder), fixed(row.face_score, 3))
        if not row.frames_with_face:
            page.paragraph("No face was found in any of its frames.")
            continue
        pictures = [
            Figure.jpeg(
                picture.jpeg,
                f"The {picture.which} frame of {row.video}",
                f"{picture.which.capitalize()}: {fixed(picture.score, 3)} at frame {picture.number}",
            )
            for picture in extreme_pictures(row, settings.every)
        ]
        if several and (face := references.face(row.reference)) is not None:
            name = Path(row.reference).name
            pictures.insert(0, Figure.jpeg(face, f"The face of {name}", f"Reference: {name}"))
        page.figures(_curve(row), *pictures, columns=2 + max(2, len(pictures)), narrow_columns=2)


def _curve(row: VideoScore) -> Figure:
    places, scores, together = _thinned(row.frame_numbers or (), row.frame_scores or ())
    low = min((score for score in scores if score is not None), default=0.0)
    markup = line_plot(
        {"score": scores}, x=places, xlabel="frame", ylabel="score", y_range=(min(0.0, low), 1.0), size=(440, 210)
    )
    caption = f"Each point is the mean of up to {together} frames." if together > 1 else ""
    return Figure.svg(markup, f"Score of each frame of {row.video}", caption=caption, span=2)


def _thinned(numbers: Sequence[int], scores: Sequence[float | None]) -> tuple[list[int], list[float | None], int]:
    """Downsample a curve to at most `_POINTS` points, each the mean of N frames.

    Returns:
        The number of the first frame of each point; the means, None where no frame has a score; and N.
    """
    together = -(-len(numbers) // _POINTS)
    places, means = [], []
    for start in range(0, len(numbers), together):
        run = [score for score in scores[start : start + together] if score is not None]
        places.append(numbers[start])
        means.append(sum(run) / len(run) if run else None)
    return places, means, together


def _facts(outcome: ScoreOutcome, settings: ScoreSettings) -> dict[str, str]:
    first, summary = outcome.rows[0], outcome.summary
    facts = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        **_backends(first, settings.faces is not None),
        "seconds": f"{summary.seconds:.1f}",
        "frames": str(summary.frames),
    }
    if settings.rewards_are_faces():
        facts |= {name: str(value) for name, value in settings if value is not None and name != "rewards"}
    else:
        facts["settings"] = str(settings)
    return facts | installed_versions(("frostline", "torch", *engine_packages(), "av"))


def _backends(row: VideoScore, faces: bool) -> dict[str, str]:
    found = {}
    if faces:
        found["face_detector"] = f"{row.face_detector} on {row.face_detector_backend}"
        found["face_embedder"] = f"{row.face_embedder} on {row.face_embedder_backend}"
    for stage, _, backend in (part.partition("=") for part in row.backends.split()):
        found[stage] = f"on {backend}"
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
