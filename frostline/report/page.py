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
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from PIL import Image

from frostline.atomic_io import atomic_write
from frostline.errors import DataError
from frostline.report.rendering import asset, render

_IMAGE_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_LARGE_IMAGE_BYTES = 200_000

Trend = Literal["better", "worse", "same"]
"""Whether a change is good news."""


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
    """A table column; figures read best when they are aligned to the right."""

    title: str
    align: Literal["left", "right"] = "left"


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
    """A plot, a picture or a clip with its words; made by `svg`, `image`, `jpeg` or `video`.

    kind: its CSS class. content: SVG markup of a plot, a data URI of others. alt: what it shows, for those who do not
    see it. wide: on a phone it keeps a legible size and scrolls sideways. span: columns of the grid that it takes.
    """

    kind: Literal["plot", "image", "clip"]
    content: str
    alt: str
    title: str = ""
    caption: str = ""
    wide: bool = False
    span: int = 1

    @classmethod
    def svg(cls, markup: str, alt: str, title: str = "", caption: str = "", span: int = 1) -> "Figure":
        """A plot as inline SVG. The markup is trusted: it comes from `frostline.report.plots`, which escapes."""
        return cls("plot", Markup(markup), alt, title, caption, span=span)

    @classmethod
    def image(cls, path: str | Path, alt: str, title: str = "", caption: str = "", wide: bool = False) -> "Figure":
        """A PNG or JPEG file, embedded; a large PNG goes in as WebP, a tenth of the size at no visible loss."""
        data = _read(path)
        media_type = next((kind for start, kind in _IMAGE_SIGNATURES.items() if data.startswith(start)), None)
        if media_type is None:
            raise DataError(f"{path}: not a PNG or JPEG picture")
        if media_type == "image/png" and len(data) > _LARGE_IMAGE_BYTES:
            data, media_type = _as_webp(data), "image/webp"
        return cls("image", _data_uri(data, media_type), alt, title, caption, wide)

    @classmethod
    def jpeg(cls, data: bytes, alt: str, caption: str = "") -> "Figure":
        """A JPEG picture that is in memory."""
        return cls("image", _data_uri(data, "image/jpeg"), alt, caption=caption)

    @classmethod
    def video(cls, path: str | Path, alt: str, caption: str = "", wide: bool = False) -> "Figure":
        """An mp4 file, embedded, with controls."""
        return cls("clip", _data_uri(_read(path), "video/mp4"), alt, caption=caption, wide=wide)


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

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names with their values, in small type: settings, versions, the machine."""
        self._add("facts", items=[*facts.items()])

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
        """Figures in a grid of `columns`, and of `narrow_columns` on a phone.

        Several clips in one grid get a button that plays them together, so that they can be compared.
        """
        together = sum(figure.kind == "clip" for figure in figures) > 1
        self._add("figures", items=figures, columns=columns, narrow_columns=narrow_columns, together=together)

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


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read for the report: {error.strerror or error}") from error


def _as_webp(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(buffer, format="WEBP", quality=90)
    return buffer.getvalue()


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
