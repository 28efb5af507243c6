"""Tables that fit the terminal: nothing is cut, and what is piped is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from frostline.escaping import printable_name

_GAP = 2
# A sentence or a path is not broken into narrower columns than this.
_NARROW = 24


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    right: align to the right, as numbers. drop: columns leave a terminal that is too narrow from the highest number
    down; 0 stays. wraps: may be broken into lines: a sentence. path: may be broken, and may lose the folder that all
    rows share.
    """

    title: str
    right: bool = False
    drop: int = 0
    wraps: bool = False
    path: bool = False


class FittedTable:
    """A table for `Console.print`, as wide as its content where there is room.

    On a narrower terminal, one after the other until it fits: paths lose the folder that they share, which is named
    above; columns that may be dropped and have one value in all rows are named below; others are dropped, in the order
    that they say; and at last each row becomes a block of lines.

    Args:
        title: a line above the table.
    """

    def __init__(self, *columns: Column, title: str = "") -> None:
        self.columns = columns
        self.title = title
        self.rows: list[tuple[Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a row of plain or styled text, one cell for each column; control characters are escaped.

        Raises:
            ValueError: there are more or fewer cells than columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells in {len(self.columns)} columns")
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
    """What is shown of a table."""

    def __init__(self, columns: list[Column], rows: list[list[Text]]) -> None:
        self.columns, self.rows = columns, rows
        self.above: list[Text] = []
        self._paths_break = False
        self._shared: list[str] = []
        self._dropped: list[str] = []

    def least_width(self) -> int:
        """Columns of the terminal that the table takes at least."""
        widths = (self._width(index) for index in range(len(self.columns)))
        return sum(widths) + _GAP * (len(self.columns) - 1)

    def share_folders(self) -> None:
        """Name once the folder that all paths of a column begin with; from now on paths may be broken."""
        self._paths_break = True
        for index, column in enumerate(self.columns):
            folder = _shared_folder([row[index].plain for row in self.rows]) if column.path else ""
            if folder:
                self.above.append(Text(f"{column.title}: in {folder}", "dim", overflow="fold"))
                for row in self.rows:
                    row[index] = row[index][len(folder) :]

    def share_values(self) -> None:
        """Name once the value of each column that may be dropped and has one in all rows."""
        for index, column in reversed([*enumerate(self.columns)]):
            values = {row[index].plain for row in self.rows}
            if column.drop and len(self.rows) > 1 and len(values) == 1:
                if value := values.pop():
                    self._shared.insert(0, f"{column.title} {value}")
                self._remove(index)

    def drop(self, width: int) -> None:
        """Drop columns until the table fits, or none is left that may be dropped."""
        while self.least_width() > width and any(column.drop for column in self.columns):
            index = max(range(len(self.columns)), key=lambda index: self.columns[index].drop)
            self._dropped.insert(0, self.columns[index].title)
            self._remove(index)

    def table(self) -> Table:
        """Return the columns that are left as a table of rich."""
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
        """What the columns had that are not shown."""
        if self._shared:
            yield Text(f"all: {', '.join(self._shared)}", "dim")
        if self._dropped:
            yield Text(f"not shown, for the width of the terminal: {', '.join(self._dropped)}", "dim")

    def _width(self, index: int) -> int:
        column = self.columns[index]
        longest = max(cell_len(text) for text in (column.title, *(row[index].plain for row in self.rows)))
        return min(longest, _NARROW) if column.wraps or (column.path and self._paths_break) else longest

    def _remove(self, index: int) -> None:
        del self.columns[index]
        for row in self.rows:
            del row[index]


def _blocks(columns: Sequence[Column], rows: Sequence[Sequence[Text]]) -> Iterator[Text]:
    """Each row as lines of title and value, with an empty line behind it."""
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if cell.plain:
                yield Text.assemble((f"{column.title or '-'}: ", "bold"), cell, overflow="fold")
        yield Text()


def _shared_folder(paths: Sequence[str]) -> str:
    """The folder, with the slash behind it, in which all paths are; empty where there is none, or one path."""
    if len(paths) < 2:
        return ""
    first, last = min(paths), max(paths)
    common = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, common) + 1]
