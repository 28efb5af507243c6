"""A self-contained HTML page: text, key figures, tables, plots, pictures and clips in one file that needs no network.

    page = Page("Scores", "12 videos against face.jpg")
    page.tiles([Tile("Face score", "0.671", before="0.583", change="+0.088", trend="better")])
    page.heading("Every video")
    page.table([Column("Video"), Column("Score", "right")], [["a.mp4", Cell("0.71", sort=0.7134)]])
    page.write("report.html")

The page follows the reader's light or dark setting and prints in black on white. Its markup is `page.html.j2`, which
escapes whatever is given as text; only the markup of an SVG goes in as it is.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from markupsafe import Markup

from frostline.atomic_io import atomic_write
from frostline.report.comparison import Comparison
from frostline.report.embedding import data_uri
from frostline.report.formatting import Trend
from frostline.report.rendering import asset, render


@dataclass(frozen=True)
class Tile:
    """A key figure, e.g. label "Face score", before "0.583", value "0.671", change "+0.088".

    trend: whether the change is good news; colours it. note: one plain sentence on what the figure means.
    """

    label: str
    value: str
    unit: str = ""
    before: str = ""
    change: str = ""
    trend: Trend = "same"
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A table column; figures read best when they are aligned to the right. breaks: long names break over lines."""

    title: str
    align: Literal["left", "right"] = "left"
    breaks: bool = False


@dataclass(frozen=True)
class Link:
    """The text of a fact that leads to a file beside the page. path: relative to the page, with / between its parts."""

    text: str
    path: str

    @property
    def href(self) -> str:
        """The path as a URL that stays below the page's folder.

        Raises:
            ValueError: it does not.
        """
        parts = PurePosixPath(self.path).parts
        if not parts or parts[0].startswith("/") or ".." in parts:
            raise ValueError(f"{self.path}: a link leads to a file below the page's folder")
        return "./" + quote(self.path, errors="surrogateescape")


@dataclass(frozen=True)
class Cell:
    """A table cell; `sort` is the number that it is sorted by, where that is not plain from the text.

    muted: a remark beside the figures, in smaller and greyer type, that may break over lines.
    """

    text: str
    sort: float | None = None
    muted: bool = False

    @property
    def sort_key(self) -> str:
        """`sort` as JavaScript reads it; empty where it is no finite number."""
        return "" if self.sort is None or not math.isfinite(self.sort) else repr(self.sort)


@dataclass(frozen=True)
class Figure:
    """A plot or a picture with its words; made by `svg` or `jpeg`.

    kind: its CSS class. content: SVG markup of a plot, a data URI of a picture. alt: what it shows, for those who do
    not see it. span: columns of the grid that it takes.
    """

    kind: Literal["plot", "image"]
    content: str
    alt: str
    title: str = ""
    caption: str = ""
    span: int = 1

    @classmethod
    def svg(cls, markup: str, alt: str, title: str = "", caption: str = "", span: int = 1) -> "Figure":
        """A plot as inline SVG. The markup is trusted: it comes from `frostline.report.plots`, which escapes."""
        return cls("plot", Markup(markup), alt, title, caption, span=span)

    @classmethod
    def jpeg(cls, data: bytes, alt: str, caption: str = "") -> "Figure":
        """A JPEG picture that is in memory."""
        return cls("image", data_uri(data, "image/jpeg"), alt, caption=caption)


class Page:
    """Collects blocks in reading order; `heading` begins a new section."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        # Each block is the name of a macro of the template, and its arguments.
        self._sections: list[list[tuple[str, dict[str, Any]]]] = [[]]

    def heading(self, text: str) -> None:
        self._sections.append([])
        self._add("heading", text=text)

    def subheading(self, text: str, note: str = "") -> None:
        """A heading within a section, with a remark in grey behind it."""
        self._add("subheading", text=text, note=note)

    def paragraph(self, text: str, lead: bool = False, trend: Trend = "same") -> None:
        """A paragraph; a lead says in larger type what the page comes to, in the colour of good or bad news."""
        self._add("paragraph", text=text, lead=lead, trend=trend)

    def tiles(self, tiles: Sequence[Tile]) -> None:
        """Key figures, side by side as the width allows."""
        self._add("tiles", items=[*tiles])

    def facts(self, facts: Mapping[str, str | Link], folded: str = "") -> None:
        """Names with their values, in small type: settings, versions, the machine.

        folded: what they are; only this is then seen until the reader unfolds them.
        """
        items = [(name, value if isinstance(value, Link) else Cell(value)) for name, value in facts.items()]
        self._add("facts", items=items, folded=folded)

    def comparison(self, comparison: Comparison) -> None:
        """Clips of one sample side by side, with one scrubber and one button to play them, and their frames."""
        self._add("comparison", shown=comparison)

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str | Cell]],
        caption: str = "",
        sortable: bool = True,
    ) -> None:
        """A table, its numbers formatted by the caller; `sortable` lets the reader sort it by any column."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        self._add("table", columns=[*columns], rows=cells, caption=caption, sortable=sortable)

    def figures(self, *figures: Figure, columns: int = 1, narrow_columns: int = 1) -> None:
        """Figures in a grid; `narrow_columns` of them on a phone."""
        self._add("figures", items=figures, columns=columns, narrow_columns=narrow_columns)

    def html(self) -> str:
        """The whole page."""
        style, script = asset("page.css"), asset("page.js")
        # The policy makes the promise binding: the browser fetches nothing, and runs no script but ours.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
        return render(
            "page.html.j2",
            title=self.title,
            subtitle=self.subtitle,
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            sections=[blocks for blocks in self._sections if blocks],
        )

    def write(self, path: str | Path) -> Path:
        """Write the page beside its place and rename it, so that it appears only complete."""
        path = Path(path)
        text = self.html()
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
        return path

    def _add(self, block: str, **arguments: Any) -> None:
        self._sections[-1].append((block, arguments))
