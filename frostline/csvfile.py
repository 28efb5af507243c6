"""Read CSV files, including those that spreadsheet programs write."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from frostline.errors import DataError


def csv_records(
    lines: Iterable[str], check_columns: Callable[[Sequence[str]], None] | None = None
) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Read the rows of a CSV file as (line number, values by column), without keeping them in memory.

    Values without a column are in a list under the key None. Empty cells without a column and empty rows are skipped:
    spreadsheet programs write them.

    Args:
        lines: the lines with their line ends, as of a text file that was opened with `newline=""`.
        check_columns: called with the names in the header before the first row; raises an error if they are invalid.
    Raises:
        DataError: the text is not valid CSV; the message begins with the row.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        if check_columns is not None:
            check_columns(reader.fieldnames or [])
        for record in reader:
            # `line_num` is the last line of a row, which has several lines if a quoted value contains line breaks.
            beyond = record.pop(None, None) or []
            line = reader.line_num - sum(value.count("\n") for value in (*record.values(), *beyond) if value)
            if any(map(_is_filled, beyond)):
                record[None] = beyond
            elif not any(map(_is_filled, record.values())):
                continue
            yield line, record
    except csv.Error as error:
        raise DataError(f"row {reader.line_num + 1}: invalid CSV: {error}") from error


def _is_filled(value: str | None) -> bool:
    return bool(value and value.strip())
