"""Names and prompts cannot control a terminal, break a page, or be computed by a spreadsheet."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.escaping import csv_cell, is_text, json_text, printable, printable_name, text_of_csv_cell

ANY_TEXT = st.text(st.characters(exclude_categories=[]) | st.sampled_from("'=+-@\t\r\n\udce9\x1b\u202e"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("café, 人, 👩\u200d🚀, שלום", "café, 人, 👩\u200d🚀, שלום"),
        ("a\x1b[2Jb\x07\x9bc\x7f", r"a\x1b[2Jb\x07\x9bc\x7f"),
        ("gnp.\u202e4pm", r"gnp.\u202e4pm"),
        (os.fsdecode(b"caf\xe9.mp4"), r"caf\xe9.mp4"),
        ("two\nlines\tand a tab\r", "two\nlines\tand a tab\\x0d"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert "\n" not in printable_name(text) and "\t" not in printable_name(text)


@given(ANY_TEXT)
def test_whatever_the_text_it_can_be_shown(text: str) -> None:
    for shown in (printable(text), printable_name(text)):
        shown.encode()
        assert not any(ord(letter) < 32 for letter in shown.replace("\n", "").replace("\t", ""))
    assert is_text(printable(text))
    assert json.loads(json_text(json.dumps(text, ensure_ascii=False)).encode()) == text


@given(ANY_TEXT)
def test_no_cell_is_a_formula_and_every_cell_is_read_back(text: str) -> None:
    cell = csv_cell(text)
    assert cell[:1] not in tuple("=+-@\t\r")
    assert text_of_csv_cell(cell) == text


def test_plain_cells_are_left_alone() -> None:
    assert [csv_cell(text) for text in ("a=b", "it's", "'tis", "")] == ["a=b", "it's", "'tis", ""]
    for text in ("=1+1", "-x", "@a", "\uff1d1", "'=1"):
        assert csv_cell(text) == f"'{text}"
