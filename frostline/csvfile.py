"""Read CSV files, including those that spreadsheet programs write."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from frostline.errors import DataError


def csv_records(text: str) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Read the rows of CSV text as (line number, values by column).

    Values without a column are in a list under the key None. Empty cells without a column and empty rows are skipped:
    spreadsheet programs write them.

    Raises:
        DataError: the text is not valid CSV; the message begins with the row.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            # The reader returns the last line of a row; a quoted value may start several lines above.
            line = reader.line_num - sum(str(value).count("\n") for value in record.values())
            beyond = record.pop(None, None) or []
            if any(map(_is_filled, beyond)):
                record[None] = beyond
            elif not any(map(_is_filled, record.values())):
                continue
            yield line, record
    except csv.Error as error:
        raise DataError(f"row {reader.line_num + 1}: invalid CSV: {error}") from error


def csv_columns(text: str) -> list[str]:
    """Return the column names in the header of CSV text.

    Raises:
        DataError: the text is not valid CSV.
    """
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        raise DataError(f"row 1: invalid CSV: {error}") from error


def _is_filled(value: str | None) -> bool:
    return bool(value and value.strip())
