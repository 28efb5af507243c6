"""Progress on the terminal: spinners and bars on a screen, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Bar(Protocol):
    """One running bar."""

    def advance(self, steps: int) -> None:
        """Move on by `steps`."""
        ...

    def describe(self, text: str) -> None:
        """Say what is going on now."""
        ...


class Progress:
    """Shows what runs, how far it is and how long it takes, on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """A task of unknown length."""
        with self._live(name, None):
            yield

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
            TextColumn("[dim]{task.fields[detail]}[/]"),
        )
        with RichProgress(*columns, console=self.console) as live:
            task = live.add_task(name, total=total or 1, detail="")
            yield _RichBar(live, task)
            live.update(task, completed=total or 1, detail="")


class _RichBar:
    def __init__(self, live: RichProgress, task: object) -> None:
        self._live = live
        self._task = task

    def advance(self, steps: int) -> None:
        self._live.advance(self._task, steps)  # type: ignore[arg-type]

    def describe(self, text: str) -> None:
        self._live.update(self._task, detail=text)  # type: ignore[arg-type]
