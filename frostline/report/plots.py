"""Draw plots as inline SVG that supports light and dark mode.

matplotlib's colours are replaced by CSS variables (`var(--plot-1, #0b6fa4)`), and its fonts by those of the page.
Outside of the page, an SVG uses the light colours. Lines and bars are labelled directly instead of with a legend.
None, NaN and infinity are missing values, and are drawn as gaps. Lengths that differ raise a ValueError.
"""

import hashlib
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from frostline.escaping import printable
from frostline.report.formatting import MINUS

Values = Sequence[float | None]
"""Numbers, of which some can be missing."""

SIZE = (420, 250)
"""Width and height in CSS pixels, small enough that text of 12 px is legible on a phone."""

COLOURS = {
    "--plot-ink": "#17212c",
    "--plot-muted": "#566473",
    "--plot-rule": "#dfe5eb",
    "--plot-1": "#0b6fa4",
    "--plot-2": "#c2570c",
    "--plot-3": "#0d8065",
    "--plot-4": "#8a5aa8",
    "--plot-5": "#8b6b00",
}
"""Light colours by CSS variable, distinguishable for colour-blind readers. The dark colours are in page.css."""

INK, MUTED, RULE, *SERIES = COLOURS.values()
_FONT_SIZE = 12
CHARACTER_WIDTH = 0.56 * _FONT_SIZE
LINE_HEIGHT = 15.0
_TOP = 30.0
"""Pixels above the plot, for the horizontal label of the y axis."""
BOTTOM = 42.0


def line_plot(
    series: Mapping[str, Values],
    x: Sequence[float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    smooth: int | None = None,
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = SIZE,
    rules: Mapping[str, float] | None = None,
) -> str:
    """Draw one line per series over `x` (default 0, 1, 2, …), labelled at its end; `rules` are dashed horizontal lines.

    Args:
        smooth: the window of the moving average in points; the original line is drawn pale behind it.
        percent: show fractions of 1 as percentages.
    """
    with figure_of(size) as (figure, axes):
        ends: list[tuple[float, float, str, str]] = []
        for index, (name, raw) in enumerate(series.items()):
            values = finite(raw)
            places = list(range(len(values))) if x is None else list(x)
            if len(places) != len(values):
                raise ValueError(f"series '{name}' has {len(values)} values for {len(places)} places on the x axis")
            colour = SERIES[index % len(SERIES)]
            averaged = moving_average(values, smooth) if smooth and smooth > 1 else values
            if averaged is not values:
                draw_line(axes, places, values, colour, width=1.0, alpha=0.3)
            draw_line(axes, places, averaged, colour, width=2.0)
            last = max((i for i, value in enumerate(averaged) if not math.isnan(value)), default=None)
            if last is not None:
                label = (
                    printable(name) if len(series) > 1 else short_number(averaged[last], percent).replace("-", MINUS)
                )
                ends.append((places[last], averaged[last], label, colour))
        if not ends:
            return as_svg(figure, axes, "no values")
        for name, value in (rules or {}).items():
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            label = f"{printable(name)} {short_number(value)}"
            axes.annotate(label, (0, value), (0, 4), ("axes fraction", "data"), "offset pixels", color=MUTED)
        if y_range is not None:
            axes.set_ylim(*y_range)
        whole = all(float(place).is_integer() for place in x or [])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole))
        _lay_out(figure, axes, xlabel, ylabel, percent, right=max(len(label) for *_, label, _ in ends))
        _label_ends(axes, ends)
        return as_svg(figure, axes)


def paired_plot(
    before: Values,
    after: Values,
    labels: tuple[str, str] = ("before", "after"),
    ylabel: str = "",
    size: tuple[int, int] = SIZE,
) -> str:
    """Draw one line for each pair from the value before to the value after; lines that fall are dashed.

    The means are marked, and written below the axis. Pairs with a missing value are skipped.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    pairs = [(b, a) for b, a in zip(finite(before), finite(after), strict=True) if not math.isnan(a + b)]
    with figure_of(size) as (figure, axes):
        if not pairs:
            return as_svg(figure, axes, "no values")
        for pair in pairs:
            rises = pair[1] >= pair[0]
            colour, dashes = (SERIES[0], "-") if rises else (SERIES[1], (0, (4, 3)))
            axes.plot([0, 1], pair, color=colour, linestyle=dashes, linewidth=1.2, alpha=0.55, clip_on=False)
            axes.plot([0, 1], pair, "o", color=colour, markersize=4, markeredgewidth=0, clip_on=False)
        axes.set_xlim(-0.12, 1.12)
        _lay_out(figure, axes, " ", ylabel, percent=False, right=1)
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        words = [f"{printable(label)}\nmean {short_number(mean)}" for label, mean in zip(labels, means, strict=True)]
        axes.set_xticks([0, 1], words)
        for tick in axes.get_xticklabels():
            tick.set_color(INK)
        _mean_mark(axes, 0, means[0])
        _mean_mark(axes, 1, means[1])
        up = sum(a > b for b, a in pairs)
        _corner_label(figure, f"{up} of {len(pairs)} up")
        return as_svg(figure, axes)


def bar_plot(
    bars: Mapping[str, Mapping[str, float | None]],
    unit: str = "",
    size: tuple[int, int] | None = None,
) -> str:
    """Draw horizontal bars: category -> series -> value, e.g. {"vae_encoder": {"engines": 3.1, "torch": 5.2}}.

    Categories are written above their bars, values at the ends of bars, and series names at the bars of the first
    category. A series has the same colour in all categories. The default height depends on the number of bars.
    """
    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    titled = len(bars) > 1
    bar, group_gap, title_height = 13.0, 12.0, LINE_HEIGHT + 3 if titled else 0.0
    height = sum(title_height + group_gap + (bar + 4) * len(group) for group in bars.values())
    with figure_of(size or (SIZE[0], max(60, round(height + 4)))) as (figure, axes):
        values = [value for group in bars.values() for value in finite(list(group.values())) if not math.isnan(value)]
        if not values:
            return as_svg(figure, axes, "no values")
        unit = f" {unit}" if unit else ""
        longest = max(*values, 1e-12)
        scale = math.inf  # length of the longest bar in pixels, such that all labels fit
        figure_width, figure_height = figure.get_size_inches() * figure.dpi
        axes.set_ylim(figure_height, 0)
        axes.set_axis_off()
        top = 0.0
        for index, (category, group) in enumerate(bars.items()):
            if titled:
                axes.text(0, top + title_height - 5, printable(category), color=INK, va="baseline")
            top += title_height
            for name, value in zip(group, finite(list(group.values())), strict=True):
                colour = SERIES[names.index(name) % len(SERIES)]
                text = "no value" if math.isnan(value) else short_number(value) + unit
                if index == 0 and len(names) > 1:
                    text += f"  {name}"
                shown = 0.0 if math.isnan(value) else value
                axes.barh(top + bar / 2, shown, height=bar, color=colour, linewidth=0, clip_on=False)
                room = figure_width - len(text) * CHARACTER_WIDTH - 12
                scale = min(scale, room * longest / shown) if shown else scale
                _beside(axes, shown, top + bar / 2, text, colour)
                top += bar + 4
            top += group_gap
        axes.set_xlim(0, longest)
        axes.set_position((0, 0, min(1.0, scale / figure_width), 1))
        return as_svg(figure, axes)


def histogram(
    values: Values,
    bins: int = 20,
    xlabel: str = "",
    ylabel: str = "",
    marks: Mapping[str, float] | None = None,
    size: tuple[int, int] = SIZE,
    x_range: tuple[float, float] | None = None,
) -> str:
    """Draw a histogram; `marks` are labelled positions on the x axis, e.g. {"median": 0.61}."""
    numbers = [value for value in finite(values) if not math.isnan(value)]
    with figure_of(size) as (figure, axes):
        if not numbers:
            return as_svg(figure, axes, "no values")
        axes.hist(
            numbers, bins=bins, range=x_range, color=SERIES[0], alpha=0.8, rwidth=0.94, linewidth=0, clip_on=False
        )
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(x_range)
        _lay_out(figure, axes, xlabel, ylabel, percent=False, right=1)
        top = axes.get_ylim()[1]
        marked = sorted((marks or {}).items(), key=lambda mark: mark[1])
        for row, (name, place) in enumerate(marked):
            y = top * (1 - 0.09 * (row % 3))
            axes.plot([place, place], [0, y], color=INK, linewidth=1.2, linestyle=(0, (2, 2)), clip_on=False)
            _beside(axes, place, y, f"{name} {short_number(place)}", INK)
        return as_svg(figure, axes)


def moving_average(values: Values, window: int) -> list[float]:
    """Return the centred moving average over `window` values; missing values are skipped, and stay missing."""
    numbers = finite(values)
    before, after = (window - 1) // 2, window // 2
    result = []
    for index, value in enumerate(numbers):
        around = [v for v in numbers[max(0, index - before) : index + after + 1] if not math.isnan(v)]
        result.append(math.nan if math.isnan(value) else sum(around) / len(around))
    return result


def finite(values: Values) -> list[float]:
    """Return the values as floats, with NaN for missing values."""
    return [float(v) if v is not None and math.isfinite(v) else math.nan for v in values]


def short_number(value: float, percent: bool = False) -> str:
    """Return a number with about three significant digits, such as 0.671, 12.4, 655 and 3.1e-05."""
    if percent:
        return f"{100 * value:.0f} %" if abs(value) >= 0.9995 or value == 0 else f"{100 * value:.1f} %"
    if value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


@contextmanager
def figure_of(size: tuple[int, int]) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of this size in CSS pixels and its axes. The style does not depend on matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        style: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": "frostline",
            "font.size": _FONT_SIZE,
            "text.parse_math": False,
            "lines.solid_capstyle": "round",
            "lines.solid_joinstyle": "round",
            "axes.xmargin": 0.0,
        }
        matplotlib.rcParams.update(style)
        width, height = size
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        yield figure, axes


def draw_line(
    axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, width: float, alpha: float | None = None
) -> None:
    """Draw a line with gaps; a single value between two gaps is drawn as a dot."""
    for is_gap, run in groupby(zip(x, y, strict=True), key=lambda point: math.isnan(point[1])):
        if is_gap:
            continue
        places, values = zip(*run, strict=True)
        if len(places) == 1:
            axes.plot(places, values, "o", color=colour, markersize=2 * width, markeredgewidth=0, alpha=alpha)
        else:
            axes.plot(places, values, "-", color=colour, linewidth=width, alpha=alpha)
    for line in axes.get_lines():
        line.set_clip_on(False)


def _lay_out(figure: Figure, axes: Axes, xlabel: str, ylabel: str, percent: bool, right: int) -> None:
    """Place the axes so that the tick labels on the left, and `right` characters on the right, fit."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %") if percent else FuncFormatter(tick_text))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    if not isinstance(axes.yaxis.get_major_locator(), MaxNLocator) or not axes.patches:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=0, pad=7, labelcolor=MUTED)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel(printable(xlabel), color=MUTED, labelpad=4)
    width, height = figure.get_size_inches() * figure.dpi
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    left = max(map(len, labels), default=0) * CHARACTER_WIDTH + 10
    right_room = right * CHARACTER_WIDTH + 12
    bottom = BOTTOM if xlabel else BOTTOM - 16
    inner_width, inner_height = width - left - right_room, height - bottom - _TOP
    axes.set_position((left / width, bottom / height, inner_width / width, inner_height / height))
    figure.text(0, 1 - 12 / height, printable(ylabel), color=MUTED, va="baseline", ha="left")


def tick_text(value: float, _position: int | None = None) -> str:
    """Return the label of an axis tick, with up to six significant digits."""
    return f"{value:.6g}".replace("-", MINUS)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the label of each (x, y, label, colour) to the right of its point; labels that overlap are moved apart."""
    to_pixels = axes.transData
    box = axes.get_window_extent()
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [float(to_pixels.transform((x, y))[1]) for x, y, *_ in ordered]
    heights = _spread(heights, LINE_HEIGHT)
    overshoot = max(0.0, heights[-1] - box.y1)
    for (x, y, label, colour), height in zip(ordered, heights, strict=True):
        offset = (9.0, height - overshoot - float(to_pixels.transform((x, y))[1]))
        axes.annotate(
            label, (x, y), offset, textcoords="offset pixels", color=colour, va="center", annotation_clip=False
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights, moved upwards until neighbours are at least `gap` apart."""
    spread = list(heights[:1])
    for height in heights[1:]:
        spread.append(max(height, spread[-1] + gap))
    return spread


def _mean_mark(axes: Axes, x: float, y: float) -> None:
    axes.plot([x - 0.05, x + 0.05], [y, y], color=INK, linewidth=2.5, solid_capstyle="butt", clip_on=False, zorder=5)


def _corner_label(figure: Figure, text: str) -> None:
    height = figure.get_figheight() * figure.dpi
    figure.text(1, 1 - 12 / height, text, color=INK, va="baseline", ha="right", fontweight="bold")


def _beside(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    place, offset, shown = (x, y), (6, 0), printable(text)
    axes.annotate(
        shown, place, offset, textcoords="offset pixels", color=colour, va="center_baseline", annotation_clip=False
    )


def as_svg(figure: Figure, axes: Axes, message: str = "") -> str:
    """Return the figure as SVG markup for HTML; if `message` is given, it replaces the axes."""
    if message:
        axes.set_axis_off()
        figure.text(0.5, 0.5, message, color=MUTED, ha="center", va="center")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    _simplify(root)
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    root.attrib.clear()
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width} {height}",
        "width": str(width),
        "height": str(height),
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
    }
    return ET.tostring(root, encoding="unicode")


def _simplify(root: ET.Element) -> None:
    """Remove styles and metadata, make ids unique within a page, and replace colours by CSS variables."""
    digest = hashlib.sha256(ET.tostring(root)).hexdigest()[:8]
    used = {element.get("{http://www.w3.org/1999/xlink}href", "#")[1:] for element in root.iter()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        link = element.attrib.pop("{http://www.w3.org/1999/xlink}href", None)
        if link is not None:
            element.set("href", f"#{digest}-{link[1:]}")
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{digest}-{name}")
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))


def _style(style: str) -> str:
    """Return a style attribute with CSS variables for colours, and without a font, so that the page's font is used."""
    kept = [part.strip() for part in style.split(";") if not part.strip().startswith("font-family")]
    style = "; ".join(kept)
    for variable, colour in COLOURS.items():
        style = style.replace(colour, f"var({variable}, {colour})")
    return style
