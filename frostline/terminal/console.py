"""Consoles that show names and prompts from outside, and never obey control characters in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from frostline.escaping import printable

# Columns of what is no screen: a file or another program gets whole lines.
_UNLIMITED = 10_000


class Terminal(Console):
    """Rich's console, which escapes all control sequences but its own, and never cuts or wraps what is piped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    @property
    def is_screen(self) -> bool:
        """Whether lines can be drawn again: a terminal that understands more than plain text."""
        return self._is_a_tty() and not self.is_dumb_terminal

    @property
    def size(self) -> ConsoleDimensions:
        """Return columns and lines; without a terminal as many columns as a line takes."""
        size = super().size
        return size if self._width is not None or self._is_a_tty() else ConsoleDimensions(_UNLIMITED, size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def _is_a_tty(self) -> bool:
        try:
            return self.file.isatty()
        except (AttributeError, ValueError):  # no file, or a closed one
            return False


@functools.cache
def error_console() -> Terminal:
    """Return the console of standard error, which log lines and progress bars share: neither writes into the other."""
    return Terminal(stderr=True)


def print_error(message: str) -> None:
    """Say on standard error what went wrong."""
    error_console().print(Text("error: ", "bold red") + Text(message), highlight=False, soft_wrap=True)
