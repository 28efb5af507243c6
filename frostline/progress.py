"""Progress output: spinners and bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from frostline.terminal import Terminal, error_console

# Minimum interval between two lines in a log.
_SECONDS_A_LINE = 20.0
_NAME_WIDTH = 18, 26
# Minimum terminal width for a long bar.
_WIDE, _LONG_BAR, _SHORT_BAR = 100, 24, 10
_REFRESHES_PER_SECOND = 5.0


class Bar(Protocol):
    """A running progress bar."""

    def advance(self, steps: int) -> None:
        """Advance the bar by `steps`."""
        ...

    def describe(self, *parts: str) -> None:
        """Describe the current work; the most important parts come first, and the last are cut if space is short."""
        ...


class Progress:
    """Show running tasks, their progress and duration on standard error; show nothing if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Terminal(stderr=True, quiet=True) if quiet else error_console()

    @contextmanager
    def task(self, name: str) -> Iterator[Bar]:
        """Show a task of unknown length."""
        with self._shown(name, None) as bar:
            yield bar

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """Show a task of `total` steps."""
        with self._shown(name, total) as bar:
            yield bar

    @contextmanager
    def _shown(self, name: str, total: int | None) -> Iterator[Bar]:
        if not self.console.is_screen:
            lines = _Lines(self.console, name, total)
            yield lines
            lines.end()
            return
        counted = (MofNCompleteColumn(),) if total is not None else ()
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            _Name(),
            _Bar(self.console),
            *counted,
            TimeElapsedColumn(),
            *((_Left(),) if total is not None else ()),
            _Parts(),
        )
        with RichProgress(
            *columns,
            console=self.console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            # Do not print piped output on the screen.
            redirect_stdout=sys.stdout.isatty(),
        ) as live:
            task = live.add_task(name, total=total, parts=(), ended=False)
            yield _ScreenBar(live, task)
            # Show no remaining time if the task ended early; the bar stays at its last position.
            live.update(task, ended=True)
            if total is None:
                live.update(task, total=1, completed=1, parts=())


class _ScreenBar:
    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self._task = live, task

    def advance(self, steps: int) -> None:
        self._live.advance(self._task, steps)

    def describe(self, *parts: str) -> None:
        self._live.update(self._task, parts=parts)


class _Lines:
    """A progress bar for logs: prints a line periodically, and one at the end."""

    def __init__(self, console: Terminal, name: str, total: int | None) -> None:
        self._console, self._name, self._total = console, name, total
        self._done = 0
        self._parts: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._said = self._began

    def advance(self, steps: int) -> None:
        self._done += steps
        if time.monotonic() > self._said + _SECONDS_A_LINE:
            self._said = time.monotonic()
            self._print(", ".join((self._how_far(), *self._parts)))

    def describe(self, *parts: str) -> None:
        self._parts = parts

    def end(self) -> None:
        """Print the final position and the elapsed time."""
        elapsed = timedelta(seconds=round(time.monotonic() - self._began))
        self._print(", ".join((f"{self._how_far()} in {elapsed}", *(self._parts if self._total else ()))))

    def _how_far(self) -> str:
        return "done" if self._total is None else f"{self._done} of {self._total}"

    def _print(self, line: str) -> None:
        self._console.print(f"{self._name}: {line}", markup=False, highlight=False, soft_wrap=True)


class _Name(ProgressColumn):
    """The name of the task, shortened if necessary."""

    def __init__(self) -> None:
        least, most = _NAME_WIDTH
        super().__init__(Column(min_width=least, max_width=most))

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Bar(BarColumn):
    """A bar whose length depends on the terminal width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        self.bar_width = _LONG_BAR if self._console.width >= _WIDE else _SHORT_BAR
        return super().render(task)


class _Left(TimeRemainingColumn):
    """Estimated remaining time; empty for a finished task."""

    def render(self, task: Task) -> Text:
        return Text() if task.finished or task.fields["ended"] else Text("ETA ", "dim") + super().render(task)


class _Parts(ProgressColumn):
    """The description of the current work, as many parts as fit."""

    # The remaining time refreshes at a limited rate; this column refreshes on every change.
    max_refresh = None

    def __init__(self) -> None:
        super().__init__(Column())

    def render(self, task: Task) -> _Fitting:
        return _Fitting(task.fields["parts"])


class _Fitting:
    """Render the first parts that fit, at least one."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._parts
        while len(shown) > 1 and cell_len(", ".join(shown)) > options.max_width:
            shown = shown[:-1]
        yield Text(", ".join(shown), "dim", no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        most = cell_len(", ".join(self._parts))
        return Measurement(min(cell_len(self._parts[0]) if self._parts else 0, most), most).with_maximum(
            options.max_width
        )
