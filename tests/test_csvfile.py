"""CSV files are read row by row, with the lines of spreadsheet programs."""

from collections.abc import Iterator, Sequence

import pytest

from frostline.csvfile import csv_records
from frostline.errors import DataError


def test_rows_are_yielded_before_the_rest_is_read() -> None:
    read = []

    def lines() -> Iterator[str]:
        for line in ["video,prompt\n", "a.mp4,one\n", "b.mp4,two\n", "c.mp4,three\n"]:
            read.append(line)
            yield line

    records = csv_records(lines())
    assert next(records) == (2, {"video": "a.mp4", "prompt": "one"})
    assert len(read) == 2
    assert [line for line, _ in records] == [3, 4]


def test_columns_are_checked_before_the_first_row() -> None:
    def refuse(columns: Sequence[str]) -> None:
        raise LookupError(f"not {columns}")

    with pytest.raises(LookupError, match=r"not \['a', 'b'\]"):
        next(csv_records(iter(["a,b\n", "1,2\n"]), refuse))


def test_an_empty_file_has_no_columns() -> None:
    seen: list[list[str]] = []
    assert list(csv_records(iter(()), lambda columns: seen.append([*columns]))) == []
    assert seen == [[]]


@pytest.mark.parametrize(("text", "row"), [('a,"b\n', 1), ('a,b\n1,"2\n', 2)])
def test_the_error_names_the_row(text: str, row: int) -> None:
    with pytest.raises(DataError, match=f"^row {row}: invalid CSV"):
        list(csv_records(text.splitlines(keepends=True)))


def test_empty_rows_and_cells_without_a_column_are_skipped() -> None:
    lines = ["a,b\n", ",\n", '"1\n', '2",3,,\n', "4,5,6\n"]
    assert list(csv_records(lines)) == [(3, {"a": "1\n2", "b": "3"}), (5, {"a": "4", "b": "5", None: ["6"]})]


def test_the_line_of_a_row_with_line_breaks_in_cells_without_a_column() -> None:
    records = csv_records(["a\n", '1,"2\n', "\n", '3"\n', "4\n"])
    assert list(records) == [(2, {"a": "1", None: ["2\n\n3"]}), (5, {"a": "4"})]
