"""Plots: gaps stay gaps, labels are text, colours follow the page, and styles of the SVG do not affect the page."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise

import matplotlib
import pytest

from frostline.escaping import printable
from frostline.report.plots import COLOURS, bar_plot, histogram, line_plot, moving_average, paired_plot
from frostline.report.stacked import Row, stacked_plot
from frostline.report.timeline import Span, timeline_plot

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def paths(svg: str, variable: str = "--plot-1") -> list[str]:
    """Return the lines that are drawn in one colour."""
    root = ET.fromstring(svg)
    defined = {id(path) for definition in root.iter(f"{SVG}defs") for path in definition.iter(f"{SVG}path")}
    return [
        path.get("d", "")
        for path in root.iter(f"{SVG}path")
        if id(path) not in defined and f"var({variable}," in path.get("style", "")
    ]


STACKED = [
    Row("reward", [0, 10, 20], [0.0, 0.1, 0.2], [0.0, 0.0, 0.1], [0.0, 0.2, 0.3], rule=0.0, dots=True),
    Row("nothing", [0, 10], [None, None], colour=1),
    Row("KL", list(range(20)), [0.1 * step if step != 7 else None for step in range(20)], smooth=3, colour=2),
]
SPANS = [
    Span("a", 0, 3.0, "engine", ""),
    Span("a", 3, 1.0, "PyTorch", "a 4 ms"),
    Span("rest", 4, 2.0, None, "rest 2 ms"),
]
KINDS = {"engine": 0, "PyTorch": 1}
PLOTS: dict[str, Callable[[], str]] = {
    "line": lambda: line_plot({"a": [1, 2, 3, None, 5], "b": [3, 2, 1, 1, 1]}, xlabel="step", ylabel="y", smooth=3),
    "bar": lambda: bar_plot({"first": {"hybrid": 1.0, "torch": 2.0}, "second": {"torch": None}}, unit="ms"),
    "histogram": lambda: histogram([0.1, 0.2, 0.2, 0.4], xlabel="score", marks={"median": 0.2}),
    "paired": lambda: paired_plot([0.5, 0.6], [0.7, 0.5]),
    "stacked": lambda: stacked_plot(STACKED, "step"),
    "timeline": lambda: timeline_plot(SPANS, KINDS, "ms"),
    "rule": lambda: line_plot({"a": [1, 2]}, rules={"baseline": 1.5}),
}


@pytest.mark.parametrize("kind", PLOTS)
def test_svg_is_clean(kind: str) -> None:
    svg = PLOTS[kind]()
    assert svg == PLOTS[kind]()
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert svg.count("http") == 1  # the namespace
    assert not any(word in svg for word in ("<style", "<metadata", "font-family: ", "DejaVu", "xlink"))
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r' href="([^"]*)"', svg)} <= set(ids)


@pytest.mark.parametrize("text", ["a\x1b[2Jb\0", "caf\udce9", "\ufffe\uffff", "\u202egnp", "<script>&\"'"], ids=ascii)
def test_any_text_can_be_a_label(text: str) -> None:
    shown = printable(text)
    for svg, labels in (
        (line_plot({text: [1, 2], "b": [1, 1]}, xlabel=text, ylabel=text), 3),
        (bar_plot({text: {text: 1.0, "b": 2.0}, "second": {"b": 1.0}}), 2),
        (histogram([0.1, 0.2], xlabel=text, ylabel=text, marks={text: 0.2}), 3),
        (paired_plot([0.1], [0.2], labels=(text, text), ylabel=text), 3),
    ):
        assert sum(shown in label for label in texts(svg)) == labels


@pytest.mark.parametrize("kind", PLOTS)
def test_every_colour_is_a_variable(kind: str) -> None:
    svg = PLOTS[kind]()
    bare = re.sub(r"var\((--[\w-]+), (#\w{6})\)", "", svg)
    assert "#000000" not in bare
    assert not any(colour in bare for colour in COLOURS.values())
    for style in re.findall(r'style="([^"]*)"', bare):
        assert not re.search(r"(fill|stroke): #", style)


def test_ids_of_different_plots_differ() -> None:
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in (paired_plot([1], [2]), paired_plot([1], [3]))]
    assert ids[0] and not set(ids[0]) & set(ids[1])


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_gap_breaks_the_line(gap: float | None) -> None:
    whole, broken = line_plot({"a": [1, 2, 3, 4, 5]}), line_plot({"a": [1, 2, gap, 4, 5]})
    assert len(paths(whole)) == 1
    assert len(paths(broken)) == 2
    assert "nan" not in broken.lower() and "inf" not in broken.lower()


def test_a_value_alone_between_gaps_is_a_dot() -> None:
    svg = line_plot({"a": [1, 2, None, 3, None, 4, 5]})
    assert len(paths(svg)) == 2
    assert svg.count("<use") == 1


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [None, math.nan]}])
def test_no_values(series: dict[str, list[float | None]]) -> None:
    assert texts(line_plot(series)) == ["no values"]
    values = next(iter(series.values()), [])
    assert texts(histogram(values)) == ["no values"]
    assert texts(paired_plot(values, values)) == ["no values"]
    assert texts(bar_plot({"a": dict(enumerate(values))} if values else {})) == ["no values"]  # type: ignore[dict-item]


def test_a_single_value_and_a_constant_line() -> None:
    assert "0.500" in texts(line_plot({"a": [0.5]}))
    assert "0.500" in texts(line_plot({"a": [0.5] * 4}, x=[1, 2, 3, 4]))


def test_labels_are_text_not_markup_nor_mathematics() -> None:
    nasty = "<b>&</b> $x^2$ \\frac"
    svg = line_plot({nasty: [1, 2], "b": [2, 1]}, xlabel=nasty, ylabel=nasty)
    assert texts(svg).count(nasty) == 3
    assert "<b>" not in svg


def test_series_are_labelled_at_their_ends_and_kept_apart() -> None:
    svg = line_plot({"first": [1, 2.0], "second": [2, 2.0], "third": [3, 2.0]})
    heights = {}
    for element in ET.fromstring(svg).iter(f"{SVG}text"):
        if element.text in ("first", "second", "third"):
            heights[element.text] = float(element.get("y", "nan"))
    ordered = sorted(heights.values())
    assert len(ordered) == 3
    assert all(below - above >= 12 for above, below in pairwise(ordered))


def test_smoothing() -> None:
    assert moving_average([1, 2, 3, 4, 5], 3) == [1.5, 2, 3, 4, 4.5]
    smoothed = moving_average([1, None, 3, 5], 3)
    assert smoothed[0] == 1 and math.isnan(smoothed[1]) and smoothed[2:] == [4, 4]
    assert len(paths(line_plot({"a": [1, 2, 3]}, smooth=2))) == 2
    assert len(paths(line_plot({"a": [1, 2, 3]}, smooth=1))) == 1


def test_percent() -> None:
    labels = texts(line_plot({"found": [0.9, 1.0, 0.95]}, percent=True, y_range=(0, 1)))
    assert {"0 %", "100 %", "95.0 %"} <= set(labels)


def test_x_must_fit() -> None:
    with pytest.raises(ValueError, match="'a' has 3 values for 2 places"):
        line_plot({"a": [1, 2, 3]}, x=[1, 2])
    with pytest.raises(ValueError, match="2 values before, 1 after"):
        paired_plot([1, 2], [1])


def test_paired_plot_counts_what_rose() -> None:
    svg = paired_plot([0.5, 0.5, 0.5, None], [0.6, 0.7, 0.4, 0.9])
    assert "2 of 3 up" in texts(svg)
    assert len(paths(svg, "--plot-1")) == 2
    assert len(paths(svg, "--plot-2")) == 1
    assert "stroke-dasharray" in svg


def test_bars_name_series_once_and_say_every_value() -> None:
    labels = texts(bar_plot({"vae": {"hybrid": 3.14159, "torch": 52.0}, "dit": {"hybrid": None, "torch": 655}}, "ms"))
    assert labels == ["vae", "3.14 ms  hybrid", "52.0 ms  torch", "dit", "no value", "655 ms"]


def test_histogram_has_all_values_and_marks() -> None:
    svg = histogram([0.1, 0.2, 0.2, None, 0.9], bins=4, marks={"median": 0.2})
    assert len(paths(svg)) == 4
    assert "median 0.200" in texts(svg)


def test_the_users_matplotlib_settings_neither_matter_nor_change() -> None:
    expected = line_plot({"a": [1, 2]})
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert line_plot({"a": [1, 2]}) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_stacked_plots_share_their_axis() -> None:
    svg = stacked_plot(STACKED, "training step")
    said = texts(svg)
    assert [said.count(label) for label in ("reward", "nothing", "KL", "no values", "training step")] == [1] * 5
    assert "0.200" in said and "1.85" in said
    # Step 0 of the first and the last plot has the same position; step 10 of the first is in the middle.
    reward, kl = (next(path for path in paths(svg, colour) if "L" in path) for colour in ("--plot-1", "--plot-3"))
    places = [[float(point.split()[0]) for point in re.split("[ML] ?", path)[1:]] for path in (reward, kl)]
    assert places[0][0] == pytest.approx(places[1][0])
    assert places[0][1] == pytest.approx((places[0][0] + places[0][2]) / 2)
    assert "no values" in texts(stacked_plot([Row("empty", [], [])]))


def widths(svg: str, variable: str) -> list[float]:
    """Return the widths of the bars of a colour."""
    numbers = [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in paths(svg, variable)]
    return [max(places[::2]) - min(places[::2]) for places in numbers]


def test_a_timeline_colours_engines_and_pytorch() -> None:
    svg = timeline_plot(SPANS, KINDS, "ms")
    (engine,), (torch,) = widths(svg, "--plot-1"), widths(svg, "--plot-2")
    assert engine == pytest.approx(3 * torch, rel=1e-3)
    assert {"engine", "PyTorch", "a 4 ms", "rest 2 ms", "ms"} <= {*texts(svg)}
    assert "no values" in texts(timeline_plot([], KINDS))


def test_a_rule_is_named_and_within_the_plot() -> None:
    svg = line_plot({"a": [1.0, 2.0]}, rules={"baseline": 5.0})
    assert "baseline 5.00" in texts(svg)
    assert len(paths(svg, "--plot-muted")) == 1
    assert "5" in texts(svg)


def test_a_histogram_has_the_range_that_it_is_given() -> None:
    narrow, whole = (texts(histogram([0.40, 0.41], bins=20, x_range=given)) for given in (None, (0.0, 1.0)))
    assert {"0", "1"} <= {*whole} and "1" not in narrow[: narrow.index("0.41") if "0.41" in narrow else 3]
