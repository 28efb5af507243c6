"""Make the parts of a scoring report that are common to all rewards: tiles, histograms and table cells."""

from __future__ import annotations

from collections.abc import Sequence

from frostline.report.formatting import NONE, fixed
from frostline.report.page import Cell, Figure, Tile
from frostline.report.plots import histogram
from frostline.score.result import VideoScore
from frostline.score.summary import Summary


def score_tiles(summary: Summary) -> list[Tile]:
    """Return a tile with the mean of each score and metric."""
    return [
        Tile(
            f"{name}, mean",
            fixed(scores.mean, 3),
            note=NONE
            if scores.mean is None
            else f"Median {fixed(scores.median, 3)}, {fixed(scores.lowest, 3)} to {fixed(scores.highest, 3)}.",
        )
        for name, scores in summary.scores.items()
    ]


def score_distributions(summary: Summary, rows: Sequence[VideoScore]) -> list[Figure]:
    """Return a histogram of each score and metric that has values."""
    figures = []
    for name in summary.scores:
        values = [row.scores[name] for row in rows if name in row.scores]
        if values:
            plot = histogram(values, bins=min(20, max(5, len(values))), xlabel=name, ylabel="videos")
            figures.append(Figure.svg(plot, alt=f"Number of videos by {name}", title=f"Videos by {name}"))
    return figures


def score_cells(row: VideoScore, names: Sequence[str]) -> list[Cell]:
    """Return the table cells with the scores of one video."""
    return [Cell(fixed(row.scores.get(name), 3), row.scores.get(name)) for name in names]
