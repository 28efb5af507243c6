"""Consoles that escape control characters in untrusted names and prompts."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from frostline.escaping import printable

# Width if the output is not a terminal: lines in files and pipes are never wrapped.
_UNLIMITED = 10_000


class Terminal(Console):
    """A rich console that escapes all control sequences except its own, and never cuts or wraps piped output."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    @property
    def is_screen(self) -> bool:
        """Return whether lines can be redrawn: the output is a terminal, and not a dumb one."""
        return self._is_a_tty() and not self.is_dumb_terminal

    @property
    def size(self) -> ConsoleDimensions:
        """Return columns and lines; the number of columns is unlimited if the output is not a terminal."""
        size = super().size
        return size if self._width is not None or self._is_a_tty() else ConsoleDimensions(_UNLIMITED, size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def _is_a_tty(self) -> bool:
        try:
            return self.file.isatty()
        except (AttributeError, ValueError):  # no file, or a closed file
            return False


@functools.cache
def error_console() -> Terminal:
    """Return the console of standard error, which log lines and progress bars share so that they do not overlap."""
    return Terminal(stderr=True)


def print_error(message: str) -> None:
    """Print an error message on standard error."""
    error_console().print(Text("error: ", "bold red") + Text(message), highlight=False, soft_wrap=True)
