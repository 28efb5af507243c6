"""Write self-contained HTML pages: text, tiles, tables, plots, pictures and clips, without external resources.

    page = Page("Scores", "12 videos against face.jpg")
    page.tiles([Tile("Face score", "0.671", before="0.583", change="+0.088", trend="better")])
    page.heading("Every video")
    page.table([Column("Video"), Column("Score", "right")], [["a.mp4", Cell("0.71", sort=0.7134)]])
    page.write("report.html")

The page supports light and dark mode, and prints black on white. The template `page.html.j2` escapes all text; only SVG
markup is inserted unchanged.
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

    Attributes:
        trend: whether the change is an improvement; sets its colour.
        note: one sentence that explains the figure.
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
    """A table column.

    Attributes:
        title: the heading.
        align: the alignment; use `right` for numbers.
        breaks: whether long words are wrapped.
    """

    title: str
    align: Literal["left", "right"] = "left"
    breaks: bool = False


@dataclass(frozen=True)
class Link:
    """A link to a file in the page's folder.

    Attributes:
        text: the text of the link.
        path: the path relative to the page, separated by `/`.
    """

    text: str
    path: str

    @property
    def href(self) -> str:
        """Return the path as a relative URL.

        Raises:
            ValueError: the path is not inside the page's folder.
        """
        parts = PurePosixPath(self.path).parts
        if not parts or parts[0].startswith("/") or ".." in parts:
            raise ValueError(f"{self.path}: a link must point to a file in the page's folder")
        return "./" + quote(self.path, errors="surrogateescape")


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: the content.
        sort: the number to sort by, if it differs from the text.
        muted: whether the text is a remark, which is shown small and grey, and can be wrapped.
    """

    text: str
    sort: float | None = None
    muted: bool = False

    @property
    def sort_key(self) -> str:
        """Return `sort` as a JavaScript number; an empty string if it is None or not finite."""
        return "" if self.sort is None or not math.isfinite(self.sort) else repr(self.sort)


@dataclass(frozen=True)
class Figure:
    """A plot or a picture with title and caption. Use `svg` or `jpeg` to create one.

    Attributes:
        kind: the CSS class.
        content: SVG markup of a plot, or a data URI of a picture.
        alt: the alternative text.
        title: the text above the figure.
        caption: the text below the figure.
        span: the number of grid columns.
    """

    kind: Literal["plot", "image"]
    content: str
    alt: str
    title: str = ""
    caption: str = ""
    span: int = 1

    @classmethod
    def svg(cls, markup: str, alt: str, title: str = "", caption: str = "", span: int = 1) -> "Figure":
        """Create a figure from SVG markup. The markup must be trusted, like that of `frostline.report.plots`."""
        return cls("plot", Markup(markup), alt, title, caption, span=span)

    @classmethod
    def jpeg(cls, data: bytes, alt: str, caption: str = "") -> "Figure":
        """Create a figure from an encoded JPEG picture."""
        return cls("image", data_uri(data, "image/jpeg"), alt, caption=caption)


class Page:
    """Collect the blocks of a page in reading order; `heading` starts a new section."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        # Each block is the name of a template macro and its arguments.
        self._sections: list[list[tuple[str, dict[str, Any]]]] = [[]]

    def heading(self, text: str) -> None:
        """Start a new section with a heading."""
        self._sections.append([])
        self._add("heading", text=text)

    def subheading(self, text: str, note: str = "") -> None:
        """Add a heading within a section, followed by a remark in grey."""
        self._add("subheading", text=text, note=note)

    def paragraph(self, text: str, lead: bool = False, trend: Trend = "same") -> None:
        """Add a paragraph. A lead is shown in larger type, in the colour of `trend`."""
        self._add("paragraph", text=text, lead=lead, trend=trend)

    def tiles(self, tiles: Sequence[Tile]) -> None:
        """Add tiles, side by side as the width allows."""
        self._add("tiles", items=[*tiles])

    def facts(self, facts: Mapping[str, str | Link], folded: str = "") -> None:
        """Add names and values in small type, such as settings and versions.

        Args:
            facts: the values by name.
            folded: the summary of a collapsed list; if empty, the list is not collapsed.
        """
        items = [(name, value if isinstance(value, Link) else Cell(value)) for name, value in facts.items()]
        self._add("facts", items=items, folded=folded)

    def comparison(self, comparison: Comparison) -> None:
        """Add clips of one sample side by side, with a common slider and play button, and their frames."""
        self._add("comparison", shown=comparison)

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str | Cell]],
        caption: str = "",
        sortable: bool = True,
    ) -> None:
        """Add a table with formatted cells. With `sortable`, a click on a heading sorts by that column.

        Raises:
            ValueError: the number of cells of a row differs from the number of columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        self._add("table", columns=[*columns], rows=cells, caption=caption, sortable=sortable)

    def figures(self, *figures: Figure, columns: int = 1, narrow_columns: int = 1) -> None:
        """Add figures in a grid with `columns` columns, or `narrow_columns` on narrow screens."""
        self._add("figures", items=figures, columns=columns, narrow_columns=narrow_columns)

    def html(self) -> str:
        """Return the page as HTML."""
        style, script = asset("page.css"), asset("page.js")
        # The content security policy blocks all external resources, and all scripts except this one.
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
        """Write the page atomically; return the path.

        Raises:
            DataError: the file cannot be written.
        """
        path = Path(path)
        text = self.html()
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
        return path

    def _add(self, block: str, **arguments: Any) -> None:
        self._sections[-1].append((block, arguments))
