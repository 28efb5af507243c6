"""CSV files that people write, spreadsheets among them."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from frostline.errors import DataError


def csv_records(text: str) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Read the rows of CSV text as (line, values by column).

    What a row holds beyond the header is a list under None. Empty cells beyond the header, and rows of nothing but
    empty cells, are what spreadsheets leave behind: they are none.

    Raises:
        DataError: it is not well-formed; the message begins with the row.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            # The reader tells the line where a row ends; a quoted text may have begun some lines before.
            line = reader.line_num - sum(str(value).count("\n") for value in record.values())
            beyond = record.pop(None, None) or []
            if any(map(_is_filled, beyond)):
                record[None] = beyond
            elif not any(map(_is_filled, record.values())):
                continue
            yield line, record
    except csv.Error as error:
        raise DataError(f"row {reader.line_num + 1}: is not well-formed csv: {error}") from error


def csv_columns(text: str) -> list[str]:
    """Return the names in the header of CSV text.

    Raises:
        DataError: it is not well-formed.
    """
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        raise DataError(f"row 1: is not well-formed csv: {error}") from error


def _is_filled(value: str | None) -> bool:
    return bool(value and value.strip())
