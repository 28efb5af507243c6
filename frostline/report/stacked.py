"""Draw small plots above each other with a common x axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from frostline.escaping import printable
from frostline.report.plots import (
    BOTTOM,
    CHARACTER_WIDTH,
    INK,
    MUTED,
    RULE,
    SERIES,
    SIZE,
    Values,
    as_svg,
    draw_line,
    figure_of,
    finite,
    moving_average,
    short_number,
    tick_text,
)

_ROW, _LABEL, _GAP = 62.0, 22.0, 12.0
"""Height in pixels of a plot, of the label above it, and of the gap below it."""


@dataclass(frozen=True)
class Row:
    """One plot of a stack.

    Attributes:
        label: the text above the plot.
        x: the x values.
        y: the y values; None is a gap.
        low: the lower end of a band around the line.
        high: the upper end of a band around the line.
        rule: the position of a dashed horizontal line.
        smooth: the window of the moving average in points; the original line is drawn pale behind it.
        dots: whether points are marked.
        colour: the index of the series colour.
    """

    label: str
    x: Sequence[float]
    y: Values
    low: Values | None = None
    high: Values | None = None
    rule: float | None = None
    smooth: int = 1
    dots: bool = False
    colour: int = 0


def stacked_plot(rows: Sequence[Row], xlabel: str = "", width: int = SIZE[0]) -> str:
    """Draw the rows with a common x axis and separate y axes, with the last value at the end of each line."""
    bottom = BOTTOM - 8 if xlabel else BOTTOM - 24
    height = len(rows) * (_LABEL + _ROW + _GAP) + bottom
    with figure_of((width, round(height))) as (figure, whole):
        whole.remove()
        places = [place for row in rows for place in finite(row.x) if not math.isnan(place)]
        if not places:
            return as_svg(figure, whole, "no values")
        left_end, right_end = min(places), max(places)
        ticks, ends = [], []
        top = 0.0
        for number, row in enumerate(rows):
            rect = (0.0, (height - top - _LABEL - _ROW) / height, 1.0, _ROW / height)
            axes = figure.add_axes(rect)
            figure.text(0, 1 - (top + 13) / height, printable(row.label), color=INK, va="baseline", ha="left")
            axes.set_xlim(left_end, right_end if right_end > left_end else left_end + 1)
            ends.append(_draw(axes, row))
            _scale(axes, row)
            ticks.append(_label_length(axes))
            is_last = number == len(rows) - 1
            axes.xaxis.set_major_locator(
                MaxNLocator(5, steps=[1, 2, 5, 10], integer=all(place.is_integer() for place in places))
            )
            axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
            axes.tick_params(length=0, pad=7, labelcolor=MUTED, labelbottom=is_last)
            if is_last:
                axes.set_xlabel(printable(xlabel), color=MUTED, labelpad=4)
            top += _LABEL + _ROW + _GAP
        left = max(ticks) * CHARACTER_WIDTH + 10
        right = max(len(text) for text, _ in ends) * CHARACTER_WIDTH + 12
        for axes, (text, place) in zip(figure.axes, ends, strict=True):
            box = axes.get_position()
            axes.set_position((left / width, box.y0, (width - left - right) / width, box.height))
            if place is not None:
                axes.annotate(
                    text, place, (9, 0), textcoords="offset pixels", color=INK, va="center", annotation_clip=False
                )
        return as_svg(figure, figure.axes[0])


def _draw(axes: Axes, row: Row) -> tuple[str, tuple[float, float] | None]:
    """Draw the line; return the text at its end and the position of the end."""
    x, values, colour = finite(row.x), finite(row.y), SERIES[row.colour % len(SERIES)]
    if row.rule is not None:
        axes.axhline(row.rule, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    if row.low is not None and row.high is not None:
        axes.fill_between(x, finite(row.low), finite(row.high), color=colour, alpha=0.18, linewidth=0)
    averaged = moving_average(values, row.smooth) if row.smooth > 1 else values
    if averaged is not values:
        draw_line(axes, x, values, colour, width=1.0, alpha=0.3)
    draw_line(axes, x, averaged, colour, width=2.0)
    if row.dots:
        axes.plot(x, values, "o", color=colour, markersize=4, markeredgewidth=0, clip_on=False)
    last = max((index for index, value in enumerate(averaged) if not math.isnan(value)), default=None)
    if last is None:
        axes.text(0.5, 0.5, "no values", color=MUTED, ha="center", va="center", transform=axes.transAxes)
        return "", None
    return short_number(averaged[last]).replace("-", "\N{MINUS SIGN}"), (x[last], averaged[last])


def _scale(axes: Axes, row: Row) -> None:
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    shown = [value for values in (row.y, row.low or (), row.high or ()) for value in finite(values)]
    shown = [value for value in (*shown, *([] if row.rule is None else [row.rule])) if not math.isnan(value)]
    if shown:
        low, high = min(shown), max(shown)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)


def _label_length(axes: Axes) -> int:
    """Return the length of the longest tick label in characters."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    return max((len(text) for text in axes.yaxis.get_major_formatter().format_ticks(ticks)), default=0)
