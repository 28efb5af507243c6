"""Progress on the terminal: spinners and bars on a screen, plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from frostline.terminal import Terminal

# Between two lines where there is no screen.
_SECONDS_A_LINE = 20.0


class Bar(Protocol):
    """One running bar."""

    def advance(self, steps: int) -> None:
        """Move on by `steps`."""
        ...

    def describe(self, text: str) -> None:
        """Say what is going on now."""
        ...


class Progress:
    """Shows what runs, how far it is and how long it takes, on standard error; nothing if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Terminal(stderr=True, quiet=quiet)

    @contextmanager
    def task(self, name: str) -> Iterator[Bar]:
        """A task of unknown length."""
        with self._live(name, None) as bar:
            yield bar

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """A task of `total` steps."""
        with self._live(name, total) as bar:
            yield bar

    @contextmanager
    def _live(self, name: str, total: int | None) -> Iterator[Bar]:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            # What is left, where that can be told.
            *([] if total is None else [TimeRemainingColumn()]),
            TextColumn("[dim]{task.fields[detail]}[/]"),
        )
        with RichProgress(*columns, console=self.console) as live:
            task = live.add_task(name, total=total or 1, detail="")
            yield _RichBar(live, task)
            # A bar tells how far its task came, also where that was ended early.
            live.update(task, detail="", completed=None if total else 1)


class _RichBar:
    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self._task = live, task
        self._said = 0.0

    def advance(self, steps: int) -> None:
        self._live.advance(self._task, steps)
        # In a log nothing moves: a line now and then.
        if not self._live.console.is_terminal and time.monotonic() > self._said + _SECONDS_A_LINE:
            self._said = time.monotonic()
            (task,) = self._live.tasks
            line = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
            line += f", {task.fields['detail']}" if task.fields["detail"] else ""
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def describe(self, text: str) -> None:
        self._live.update(self._task, detail=text)
