"""Print scores on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from frostline.escaping import printable_name
from frostline.score.result import FACE_SCORE, REFERENCE_NOTE, VideoScore
from frostline.score.run import ScoreOutcome
from frostline.score.summary import HISTOGRAM_EDGES, ScoreStatistics, Summary, decide
from frostline.terminal.tables import Column, FittedTable

_FACE_COLUMNS = (
    Column("face score", right=True),
    Column("missing as 0", right=True, drop=3),
    Column("faces found", right=True, drop=2),
    Column("worst frame", right=True, drop=1),
)
_SHOWN = 40
_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_outcome(outcome: ScoreOutcome, console: Console) -> None:
    """Print the rows of the first 40 videos, all errors and notes, and the summary."""
    rows, scores = outcome.rows, tuple(outcome.summary.scores)
    faces = FACE_SCORE in outcome.labels
    shown = rows[:_SHOWN]
    table = FittedTable(
        Column("video", path=True),
        *(_FACE_COLUMNS if faces else ()),
        # If the terminal is narrow, metrics are dropped first, and scores of rewards are never dropped.
        *(Column(name, right=True, drop=0 if name in outcome.labels else 5) for name in scores),
        Column("frames", right=True, drop=4),
    )
    for row in shown:
        if row.status == "ok":
            numbers = [*(_face_cells(row) if faces else ()), *(_number(row.scores.get(name)) for name in scores)]
            table.add_row(row.video, *numbers, str(row.frames))
    if table.rows:
        console.print(table)
    if len(rows) > len(shown):
        console.print(f"and {len(rows) - len(shown)} more")
    notes: dict[tuple[str, str], None] = {}  # a note on a reference is printed once, not for each of its videos
    for row in rows:
        if row.status == "error":
            console.print(_remark("[bold red]failed[/]", row.video, row.error), soft_wrap=True, highlight=False)
        else:
            own, _, of_reference = row.note.partition(REFERENCE_NOTE)
            notes |= {(row.video, own.removesuffix("; ")): None, (row.reference, of_reference): None}
    for name, note in notes:
        if note:
            console.print(_remark("[yellow]note[/]", name, note), soft_wrap=True, highlight=False)
    for line in summary_lines(outcome.summary):
        console.print(line, highlight=False)
    if (decision := decide(rows)) is not None:
        console.print(Text(decision.sentence, "bold"))


def summary_lines(summary: Summary) -> list[str]:
    """Return the summary as lines of text."""
    lines = []
    if summary.mean is not None and summary.median is not None:
        lines.append(f"face score: mean {summary.mean:.3f}, median {summary.median:.3f}  {_sparkline(summary)}")
    scored = summary.videos - summary.failed
    for name, of_score in summary.scores.items():
        lines.append(f"{name}: {_statistics(of_score, scored)}")
    counted = f"{scored} of {summary.videos} videos scored"
    if summary.without_face:
        counted += f", {summary.without_face} of them without any face"
    lines.append(f"{counted}, {summary.frames} frames")
    if summary.frames_per_second is not None:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.stage_seconds.items())
        lines.append(f"{summary.seconds:.1f} s, {summary.frames_per_second:.1f} frames/s ({stages})")
    return lines


def _remark(kind: str, name: str, text: str) -> str:
    text = printable_name(text.removeprefix(f"{name}: "))
    return f"{kind} {escape(f'{printable_name(name)}: {text}')}"


def _statistics(scores: ScoreStatistics, videos: int) -> str:
    if scores.mean is None:
        return "no video has this score"
    text = f"mean {scores.mean:.3f}, median {scores.median:.3f}, {scores.lowest:.3f} to {scores.highest:.3f}"
    return text if scores.videos == videos else f"{text} ({scores.videos} videos)"


def _face_cells(row: VideoScore) -> list[str]:
    rate = "-" if row.detection_rate is None else f"{100 * row.detection_rate:.1f} %"
    worst = "-" if row.worst_frame is None else f"{row.worst_frame} ({row.worst_frame_score:.3f})"
    return [_number(row.face_score), _number(row.face_score_missing_zero), rate, worst]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sparkline(summary: Summary) -> str:
    """Return the histogram as one line of block characters, from the lowest to the highest score."""
    filled = [index for index, count in enumerate(summary.histogram) if count]
    bins = range(filled[0], filled[-1] + 1)
    most = max(summary.histogram)
    bars = "".join(_BLOCKS[-(-summary.histogram[index] * (len(_BLOCKS) - 1) // most)] for index in bins)
    return f"{HISTOGRAM_EDGES[bins[0]]:g} {bars} {HISTOGRAM_EDGES[bins[-1] + 1]:g}"
