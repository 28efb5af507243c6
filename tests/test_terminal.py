"""Printed names can contain anything: the terminal shows them, and its own colours stay."""

import io
import logging

import pytest
from rich.markup import escape
from rich.table import Table

from frostline.terminal import Terminal
from frostline.terminal import logs as logs_file
from frostline.terminal.logs import ConsoleLog

NAME = "a\x1b]0;owned\x07\x1b[2J\udce9.mp4"
SHOWN = r"a\x1b]0;owned"


def printed(what: object, **options: bool) -> str:
    file = io.StringIO()
    Terminal(file=file, width=120, **options).print(what, highlight=False)
    file.getvalue().encode()
    return file.getvalue()


def test_names_are_shown_and_not_obeyed() -> None:
    table = Table("video")
    table.add_row(escape(NAME))
    for what in (escape(NAME), f"[bold]{escape(NAME)}[/]", table):
        said = printed(what)
        assert SHOWN in said
        assert "\x1b" not in said and "\x07" not in said


def test_the_terminals_own_colours_stay() -> None:
    said = printed(f"[bold red]{escape(NAME)}[/]", force_terminal=True)
    assert said.startswith("\x1b[1;31m") and SHOWN in said


def test_the_log_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(logs_file, "error_console", lambda: Terminal(file=file))
    ConsoleLog().emit(logging.LogRecord("frostline", logging.WARNING, "", 0, "[b]%s: no such file", (NAME,), None))
    assert file.getvalue().startswith(f"warning: [b]{SHOWN}") and "\x1b" not in file.getvalue()


def test_what_is_piped_is_neither_wrapped_nor_cut() -> None:
    file, line = io.StringIO(), "word " * 100
    console = Terminal(file=file)
    console.print(line)
    table = Table("a", "b", box=None, pad_edge=False)
    table.add_row(line, "end")
    console.print(table)
    printed, _, row = file.getvalue().splitlines()
    assert printed == line and row.startswith(line) and row.rstrip().endswith("end")
