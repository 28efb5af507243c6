"""The page: all text is escaped, nothing is fetched, elements are nested correctly, and a browser can show it."""

import os
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import needs_chromium, render
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup as TrustedMarkup

from frostline.errors import DataError
from frostline.escaping import printable
from frostline.report.comparison import Clip, Comparison, ScoreChange
from frostline.report.page import Cell, Column, Figure, Link, Page, Tile
from frostline.report.plots import COLOURS, line_plot, paired_plot
from frostline.report.rendering import environment

NASTY = """<script>alert("1")</script> & 'it' </style>"""
VOID = {"meta", "img", "br", "link", "input"}


class Markup(HTMLParser):
    """A strict parser of a page: every element is closed in order, and ids are unique."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = self.attribute("id")
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def attribute(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def two_plots(text: str) -> list[str]:
    lines = line_plot({text: [1.0, None, 3.0], "b": [2, 1, 2]}, ylabel=text, xlabel=text)
    return [lines, paired_plot([0.1], [0.2])]


def full_page(text: str = "words", plots: Sequence[str] | None = None) -> Page:
    """Return a page with every kind of block and the same text everywhere; `plots` are two plots."""
    first, second = two_plots(text) if plots is None else plots
    page = Page(text, text)
    page.paragraph(text, lead=True)
    page.tiles([Tile(text, text, unit=text, before=text, change=text, note=text, trend="better"), Tile("a", "1")])
    page.heading(text)
    page.subheading(text, text)
    page.table(
        [Column(text), Column("score", "right")], [[text, Cell("0.2", 0.21)], [Cell(text, muted=True), "0.1"]], text
    )
    page.table([Column(text)], [], sortable=False)
    page.figures(
        Figure.svg(first, text, text, text, span=2),
        Figure.svg(second, text),
        Figure.jpeg(b"", text, text),
        columns=2,
    )
    page.facts({text: text, "file": Link(text, "adapter/a b.bin")})
    page.facts({text: text}, folded=text)
    scores = (ScoreChange(text, text, text, text, "better"), ScoreChange("a", "", "1"))
    clips = (
        Clip(text, text, "data:,", "data:,", text, 2, (text, text)),
        Clip("b", "b", "data:,", "data:,", "b", 1, ()),
    )
    page.comparison(Comparison(text, text, scores, clips, 8.0, 1, (0, 1)))
    page.comparison(Comparison("bare", "", (), clips[1:], 8.0, 0, (0,)))
    return page


def test_text_is_escaped_everywhere() -> None:
    plain, nasty = Markup(full_page().html()), Markup(full_page(NASTY).html())
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    assert nasty.count("script") == 1
    assert nasty.texts.count(NASTY) == plain.texts.count("words") > 15
    assert nasty.attribute("alt") == [NASTY, NASTY, "b", "b"]


HOSTILE = st.lists(
    st.sampled_from(
        ["<script>", "</title>", "<!--", "-->", "]]>", "&lt;", "&#34;", '"', "'", "`", " onload=x ", "{{ 7 }}"]
    )
    | st.sampled_from(["\0", "\x1b[2J", "\r", "\n", "\x9b", "\u2028", "\u202e", "\udce9", "\ud800", "人"])
    | st.characters(exclude_categories=[]),
    min_size=1,
).map("".join)


@given(text=HOSTILE)
@settings(deadline=None, max_examples=150)
def test_whatever_the_text_the_elements_are_ours(text: str) -> None:
    place = "(place)"
    ours = Markup(full_page(place, plots=["<svg></svg>"] * 2).html())
    html = full_page(text, plots=["<svg></svg>"] * 2).html()
    found = Markup(html)
    shown = printable(text)
    assert found.tags == [
        (tag, {name: shown if value == place else value for name, value in attributes.items()})
        for tag, attributes in ours.tags
    ]
    assert "".join(found.texts) == "".join(ours.texts).replace(place, shown)
    assert printable(html) == html


def test_the_full_page_has_every_kind_of_block() -> None:
    used = {block for section in full_page()._sections for block, _ in section}
    assert used == {name for name in vars(Page) if not name.startswith("_")} - {"html", "write"}


def test_no_template_can_forget_what_text_needs() -> None:
    template = environment().from_string("<p>{{ text }} {{ text ~ mark }}</p>")
    shown = template.render(text="\x1b<", mark=TrustedMarkup("<br>"))
    assert shown == r"<p>\x1b&lt; \x1b&lt;<br></p>"
    with pytest.raises(UndefinedError, match="mark"):
        template.render(text="")


def test_what_steers_a_terminal_is_written_out() -> None:
    page = Page("a\x1b[2Jb", "caf\udce9.mp4")
    page.paragraph("4pm.\u202egnp")
    html = page.html()
    html.encode()
    assert r"a\x1b[2Jb" in html and r"caf\xe9.mp4" in html and r"4pm.\u202egnp" in html


def test_no_external_resource() -> None:
    markup = Markup(full_page().html())
    sources = [value for name in ("src", "href", "srcset", "poster", "action") for value in markup.attribute(name)]
    assert len(sources) >= 4
    assert all(source.startswith(("data:", "#")) or source == "./adapter/a%20b.bin" for source in sources)
    assert markup.count("link") == 0
    css = next(text for text in markup.texts if "--ground" in text)
    assert "url(" not in css and "@import" not in css
    policy = markup.attribute("content")[0]
    assert policy.startswith("default-src 'none'")


def test_sort_keys_are_finite_numbers() -> None:
    page = Page("table")
    page.table([Column("a")], [[Cell("x", 0.1)], [Cell("none", float("nan"))], [Cell("y", float("inf"))]])
    assert Markup(page.html()).attribute("data-sort") == ["0.1"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "", "//host/a"])
def test_a_link_leads_to_no_place_but_files_below_the_page(path: str) -> None:
    page = Page("links")
    page.facts({"file": Link("text", path)})
    with pytest.raises(ValueError, match="in the page's folder"):
        page.html()


@pytest.mark.parametrize(("path", "href"), [("javascript:alert(1)", "./javascript%3Aalert%281%29"), ("a/b", "./a/b")])
def test_a_link_is_a_path_whatever_it_looks_like(path: str, href: str) -> None:
    page = Page("links")
    page.facts({"file": Link("text", path)})
    assert Markup(page.html()).attribute("href") == [href]


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells in a table of 1 columns"):
        Page("table").table([Column("a")], [["1", "2"]])


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    assert Page("first").write(path) == path
    assert "<title>first</title>" in path.read_text()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DataError, match=r"report\.html: cannot be written: No space left"):
        Page("second").write(path)
    assert "<title>first</title>" in path.read_text()
    assert os.listdir(path.parent) == ["report.html"]  # noqa: PTH208


def test_text_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    path = Page("file \udcff.mp4").write(tmp_path / "report.html")
    assert r"file \xff.mp4" in path.read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_read_on_both_grounds(dark: bool) -> None:
    css = re.search(r"<style>(.*?)</style>", Page("x").html(), re.S)
    assert css is not None
    rules = re.findall(r":root \{(.*?)\}", css[1], re.S)
    colours = dict(re.findall(r"(--[\w-]+): (#\w{6});", rules[0]))
    assert {name: colours[name] for name in COLOURS} == COLOURS
    if dark:
        colours |= dict(re.findall(r"(--[\w-]+): (#\w{6});", rules[1]))
    for name, colour in colours.items():
        if name not in ("--ground", "--rule", "--plot-rule"):
            assert contrast(colour, colours["--ground"]) >= 4.5, name


@needs_chromium
def test_browser_shows_the_page_within_its_policy(tmp_path: Path) -> None:
    path = full_page(NASTY).write(tmp_path / "report.html")
    dom, log = render(path, tmp_path / "profile")
    assert Markup(dom).texts.count(NASTY) > 15
    assert "Content Security Policy" not in log


@needs_chromium
def test_browser_sorts_a_table(tmp_path: Path) -> None:
    page = Page("sort")
    rows = [["b10", Cell("2 ms", 2.0)], ["b9", "none"], ["a", Cell("10 ms", 10.0)], ["c", Cell("-1 ms", -1.0)]]
    page.table([Column("name"), Column("time", "right")], rows)
    # The policy would prevent the test's own script from running.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.html())
    script = """<script>
      const order = () => [...document.querySelectorAll("td:first-child")].map((cell) => cell.textContent).join();
      const [name, time] = document.querySelectorAll("th button");
      const seen = [];
      for (const button of [time, time, name]) { button.click(); seen.push(order()); }
      document.title = seen.join(" | ");
    </script></body>"""
    path = tmp_path / "sort.html"
    path.write_text(html.replace("</body>", script), encoding="utf-8")
    dom, _ = render(path, tmp_path / "profile")
    assert "<title>c,b10,a,b9 | a,b10,c,b9 | a,b9,b10,c</title>" in dom
