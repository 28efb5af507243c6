"""Draw a timeline of spans, coloured by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter, MaxNLocator

from frostline.escaping import printable
from frostline.report.plots import BOTTOM, CHARACTER_WIDTH, INK, MUTED, RULE, SERIES, SIZE, as_svg, figure_of, tick_text

_LINE, _BAR, _LEGEND = 19.0, 13.0, 26.0
"""Height in pixels of a line, of a bar, and of the legend."""


@dataclass(frozen=True)
class Span:
    """A bar of the timeline.

    Attributes:
        line: the name of its line; spans with the same name share a line.
        start: the start, in units of the x axis.
        length: the length, in the same units.
        kind: the kind, which sets the colour; None for grey.
        text: the label.
    """

    line: str
    start: float
    length: float
    kind: str | None
    text: str


def timeline_plot(spans: Sequence[Span], kinds: Mapping[str, int], xlabel: str = "", width: int = SIZE[0]) -> str:
    """Draw the spans from top to bottom; the `text` of the last span of each line is its label.

    Args:
        spans: the spans in order.
        kinds: the index of the series colour for each kind.
        xlabel: the label of the x axis.
        width: the width in CSS pixels.
    """
    lines = list(dict.fromkeys(span.line for span in spans))
    height = round(_LEGEND + _LINE * len(lines) + BOTTOM)
    with figure_of((width, max(80, height))) as (figure, axes):
        end = max((span.start + span.length for span in spans), default=0.0)
        if end <= 0:
            return as_svg(figure, axes, "no values")
        axes.set_position((0, BOTTOM / height, 1 - 10 / width, 1 - (BOTTOM + _LEGEND) / height))
        axes.set_xlim(0, end)
        axes.set_ylim(_LINE * len(lines), 0)
        for span in spans:
            middle = _LINE * (lines.index(span.line) + 0.5)
            colour = MUTED if span.kind is None else SERIES[kinds[span.kind] % len(SERIES)]
            axes.barh(middle, span.length, left=span.start, height=_BAR, color=colour, linewidth=0)
        for line in lines:
            own = [span for span in spans if span.line == line]
            begins, ends = own[0].start, own[-1].start + own[-1].length
            fits_behind = (1 - ends / end) * width > len(own[-1].text) * CHARACTER_WIDTH + 12
            place, offset, side = (ends, 6, "left") if fits_behind else (begins, -6, "right")
            where = (place, _LINE * (lines.index(line) + 0.5))
            axes.annotate(
                printable(own[-1].text),
                where,
                (offset, 0),
                textcoords="offset pixels",
                color=INK,
                ha=side,
                va="center_baseline",
                annotation_clip=False,
            )
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.tick_params(length=0, pad=7, labelcolor=MUTED)
        axes.set_xlabel(printable(xlabel), color=MUTED, labelpad=4)
        left = 0.0
        for kind, number in kinds.items():
            if any(span.kind == kind for span in spans):
                words = printable(kind)
                figure.text(left / width, 1 - 12 / height, words, color=SERIES[number % len(SERIES)], fontweight="bold")
                left += len(words) * CHARACTER_WIDTH + 24
        return as_svg(figure, axes)
