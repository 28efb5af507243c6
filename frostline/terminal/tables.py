"""Tables that fit the terminal without cutting cells; piped output is complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from frostline.escaping import printable_name

_GAP = 2
# Minimum width of a column with sentences or paths.
_NARROW = 24


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    Attributes:
        title: header of the column.
        right: align to the right, for numbers.
        drop: priority for dropping the column in a narrow terminal; the highest number is dropped first, 0 never.
        wraps: whether cells may be broken into lines, for sentences.
        path: whether cells may be broken into lines, and the common folder of all rows may be removed.
    """

    title: str
    right: bool = False
    drop: int = 0
    wraps: bool = False
    path: bool = False


class FittedTable:
    """A table for `Console.print`, as wide as its content if the terminal is wide enough.

    In a narrower terminal, these steps are applied in order until the table fits: the common folder of paths is removed
    and printed above; columns with `drop` and the same value in all rows are removed and printed below; further columns
    are dropped by priority; finally, each row is printed as a block of lines.

    Args:
        title: a line above the table.
    """

    def __init__(self, *columns: Column, title: str = "") -> None:
        self.columns = columns
        self.title = title
        self.rows: list[tuple[Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a row of plain or styled text with one cell for each column; control characters are escaped.

        Raises:
            ValueError: the number of cells differs from the number of columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(tuple(cell if isinstance(cell, Text) else Text(printable_name(cell)) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        layout = _Layout([*self.columns], [[*row] for row in self.rows])
        if self.title:
            yield Text(self.title, "italic")
        if not self.rows:
            yield layout.table()
            return
        for step in (lambda: None, layout.share_folders, layout.share_values, lambda: layout.drop(width)):
            step()
            if layout.least_width() <= width:
                yield from layout.above
                yield layout.table()
                yield from layout.below()
                return
        yield from _blocks(self.columns, self.rows)


class _Layout:
    """The visible part of a table."""

    def __init__(self, columns: list[Column], rows: list[list[Text]]) -> None:
        self.columns, self.rows = columns, rows
        self.above: list[Text] = []
        self._paths_break = False
        self._shared: list[str] = []
        self._dropped: list[str] = []

    def least_width(self) -> int:
        """Return the minimum width of the table in characters."""
        widths = (self._width(index) for index in range(len(self.columns)))
        return sum(widths) + _GAP * (len(self.columns) - 1)

    def share_folders(self) -> None:
        """Remove the common folder from path columns and print it above; paths may be broken from now on."""
        self._paths_break = True
        for index, column in enumerate(self.columns):
            folder = shared_folder([row[index].plain for row in self.rows]) if column.path else ""
            if folder:
                self.above.append(Text(f"{column.title}: in {folder}", "dim", overflow="fold"))
                for row in self.rows:
                    row[index] = row[index][len(folder) :]

    def share_values(self) -> None:
        """Remove columns with `drop` that have the same value in all rows, and print the values below."""
        for index, column in reversed([*enumerate(self.columns)]):
            values = {row[index].plain for row in self.rows}
            if column.drop and len(self.rows) > 1 and len(values) == 1:
                if value := values.pop():
                    self._shared.insert(0, f"{column.title} {value}")
                self._remove(index)

    def drop(self, width: int) -> None:
        """Drop columns until the table fits or none is left that may be dropped."""
        while self.least_width() > width and any(column.drop for column in self.columns):
            index = max(range(len(self.columns)), key=lambda index: self.columns[index].drop)
            self._dropped.insert(0, self.columns[index].title)
            self._remove(index)

    def table(self) -> Table:
        """Return the remaining columns as a rich table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in self.columns:
            table.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                no_wrap=not (column.wraps or column.path),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def below(self) -> Iterator[Text]:
        """Yield lines about the removed columns."""
        if self._shared:
            yield Text(f"all: {', '.join(self._shared)}", "dim")
        if self._dropped:
            yield Text(f"not shown because the terminal is too narrow: {', '.join(self._dropped)}", "dim")

    def _width(self, index: int) -> int:
        column = self.columns[index]
        longest = max(cell_len(text) for text in (column.title, *(row[index].plain for row in self.rows)))
        return min(longest, _NARROW) if column.wraps or (column.path and self._paths_break) else longest

    def _remove(self, index: int) -> None:
        del self.columns[index]
        for row in self.rows:
            del row[index]


def _blocks(columns: Sequence[Column], rows: Sequence[Sequence[Text]]) -> Iterator[Text]:
    """Yield each row as lines of title and value, followed by an empty line."""
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if cell.plain:
                yield Text.assemble((f"{column.title or '-'}: ", "bold"), cell, overflow="fold")
        yield Text()


def shared_folder(paths: Sequence[str]) -> str:
    """Return the common folder of all paths, with a trailing slash; empty if there is none, or for one path."""
    if len(paths) < 2:
        return ""
    first, last = min(paths), max(paths)
    common = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, common) + 1]
