"""A self-contained HTML page: text, key figures, tables, plots, pictures and clips in one file that needs no network.

    page = Page("Scores", "12 videos against face.jpg")
    page.tiles([Tile("Face score", "0.671", before="0.583", change="+0.088", trend="better")])
    page.heading("Every video")
    page.table([Column("Video"), Column("Score", "right")], [["a.mp4", Cell("0.71", sort=0.7134)]])
    page.write("report.html")

The page follows the reader's light or dark setting and prints in black on white. Whatever is given as text is escaped;
only the markup of an SVG goes in as it is.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from PIL import Image

from frostline.atomic_io import atomic_write
from frostline.errors import DataError
from frostline.escaping import html_text

_IMAGE_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_LARGE_IMAGE_BYTES = 200_000


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
    trend: Literal["better", "worse", "same"] = "same"
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


@dataclass(frozen=True)
class Figure:
    """A plot, a picture or a clip with its words; made by `svg`, `image` or `video`.

    body: markup. kind: its CSS class. wide: on a phone it keeps a legible size and scrolls sideways.
    span: columns of the grid that it takes.
    """

    kind: Literal["plot", "image", "clip"]
    body: str
    title: str = ""
    caption: str = ""
    wide: bool = False
    span: int = 1

    @classmethod
    def svg(cls, markup: str, alt: str, title: str = "", caption: str = "", span: int = 1) -> "Figure":
        """A plot as inline SVG. The markup is trusted: it comes from `frostline.report.plots`, which escapes."""
        return cls("plot", f'<div role="img" aria-label="{html_text(alt)}">{markup}</div>', title, caption, span=span)

    @classmethod
    def image(cls, path: str | Path, alt: str, title: str = "", caption: str = "", wide: bool = False) -> "Figure":
        """A PNG or JPEG file, embedded; a large PNG goes in as WebP, a tenth of the size at no visible loss."""
        data = _read(path)
        media_type = next((kind for start, kind in _IMAGE_SIGNATURES.items() if data.startswith(start)), None)
        if media_type is None:
            raise DataError(f"{path}: not a PNG or JPEG picture")
        if media_type == "image/png" and len(data) > _LARGE_IMAGE_BYTES:
            data, media_type = _as_webp(data), "image/webp"
        body = f'<img src="{_data_uri(data, media_type)}" alt="{html_text(alt)}">'
        return cls("image", body, title, caption, wide)

    @classmethod
    def jpeg(cls, data: bytes, alt: str, caption: str = "") -> "Figure":
        """A JPEG picture that is in memory."""
        return cls("image", f'<img src="{_data_uri(data, "image/jpeg")}" alt="{html_text(alt)}">', caption=caption)

    @classmethod
    def video(cls, path: str | Path, alt: str, caption: str = "", wide: bool = False) -> "Figure":
        """An mp4 file, embedded, with controls."""
        source = _data_uri(_read(path), "video/mp4")
        label = html_text(alt)
        body = f'<video controls loop muted playsinline preload="auto" aria-label="{label}" src="{source}"></video>'
        return cls("clip", body, caption=caption, wide=wide)


class Page:
    """Collects blocks in reading order; `heading` begins a new section."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[list[str]] = [[]]

    def heading(self, text: str) -> None:
        self._sections.append([f"<h2>{html_text(text)}</h2>"])

    def subheading(self, text: str, note: str = "") -> None:
        """A heading within a section, with a remark in grey behind it."""
        remark = f' <span class="remark">{html_text(note)}</span>' if note else ""
        self._add(f'<h3 class="item">{html_text(text)}{remark}</h3>')

    def paragraph(self, text: str, lead: bool = False) -> None:
        """A paragraph; a lead says in larger type what the page comes to."""
        opening = '<p class="lead">' if lead else "<p>"
        self._add(f"{opening}{html_text(text)}</p>")

    def tiles(self, tiles: Sequence[Tile]) -> None:
        """Key figures, side by side as the width allows."""
        self._add(f'<dl class="tiles">{"".join(map(_tile, tiles))}</dl>')

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names with their values, in small type: settings, versions, the machine."""
        pairs = (f"<div><dt>{html_text(name)}</dt><dd>{html_text(value)}</dd></div>" for name, value in facts.items())
        self._add(f'<dl class="facts">{"".join(pairs)}</dl>')

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
        head = "".join(_header(column, sortable) for column in columns)
        body = "".join(f"<tr>{''.join(map(_cell, row, columns))}</tr>" for row in rows)
        words = f"<figcaption>{html_text(caption)}</figcaption>" if caption else ""
        marked = ' class="sortable"' if sortable else ""
        self._add(
            '<figure class="table"><div class="scroll" tabindex="0">'
            f"<table{marked}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{words}</figure>"
        )

    def figures(self, *figures: Figure, columns: int = 1, narrow_columns: int = 1) -> None:
        """Figures in a grid of `columns`, and of `narrow_columns` on a phone.

        Several clips in one grid get a button that plays them together, so that they can be compared.
        """
        clips = sum(figure.kind == "clip" for figure in figures)
        button = '<p><button type="button" class="play">Play all together</button></p>' if clips > 1 else ""
        style = f"--columns: {columns}; --narrow-columns: {narrow_columns}"
        body = "".join(map(_figure, figures))
        self._add(f'<div class="group">{button}<div class="figures" style="{style}">{body}</div></div>')

    def html(self) -> str:
        """The whole page."""
        style, script = _asset("page.css"), _asset("page.js")
        # The policy makes the promise binding: the browser fetches nothing, and runs no script but ours.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
        subtitle = f'<p class="subtitle">{html_text(self.subtitle)}</p>' if self.subtitle else ""
        sections = "\n".join(f"<section>{''.join(blocks)}</section>" for blocks in self._sections if blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{html_text(self.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            f'<header><p class="brand">frostline</p><h1>{html_text(self.title)}</h1>{subtitle}</header>\n'
            f"<main>\n{sections}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page beside its place and rename it, so that it appears only complete."""
        path = Path(path)
        text = self.html()
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
        return path

    def _add(self, block: str) -> None:
        self._sections[-1].append(block)


def _tile(tile: Tile) -> str:
    before = (
        f'<span class="before">{html_text(tile.before)} <span class="arrow">→</span> </span>' if tile.before else ""
    )
    unit = f' <span class="unit">{html_text(tile.unit)}</span>' if tile.unit else ""
    change = f'<dd class="change {tile.trend}">{html_text(tile.change)}</dd>' if tile.change else ""
    note = f'<dd class="note">{html_text(tile.note)}</dd>' if tile.note else ""
    value = f'<dd class="value">{before}<strong>{html_text(tile.value)}</strong>{unit}</dd>'
    return f"<div><dt>{html_text(tile.label)}</dt>{value}{change}{note}</div>"


def _header(column: Column, sortable: bool) -> str:
    title = html_text(column.title)
    text = f'<button type="button">{title}</button>' if sortable else title
    return f'<th scope="col" class="{column.align}">{text}</th>'


def _cell(cell: str | Cell, column: Column) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    key = "" if cell.sort is None or not math.isfinite(cell.sort) else f' data-sort="{cell.sort!r}"'
    return f'<td class="{column.align}{" muted" if cell.muted else ""}"{key}>{html_text(cell.text)}</td>'


def _figure(figure: Figure) -> str:
    title = f"<h3>{html_text(figure.title)}</h3>" if figure.title else ""
    caption = f"<figcaption>{html_text(figure.caption)}</figcaption>" if figure.caption else ""
    body = f'<div class="scroll wide" tabindex="0">{figure.body}</div>' if figure.wide else figure.body
    span = f' style="grid-column: span {figure.span}"' if figure.span > 1 else ""
    return f'<figure class="{figure.kind}"{span}>{title}{body}{caption}</figure>'


def _asset(name: str) -> str:
    return resources.files("frostline.report").joinpath(name).read_text(encoding="utf-8")


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
