"""Commands on a pseudo-terminal, and what a user would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyte
from forked import Python

_LINES = 60


@dataclass(frozen=True)
class Seen:
    """The screen at the end: its lines, the colours on it, and the exit code."""

    lines: list[str]
    colours: frozenset[str]
    code: int

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def on_terminal(
    *arguments: str,
    columns: int = 80,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[list[str]], None] = lambda lines: None,
) -> Seen:
    """Run Python with these arguments (see `forked.Python`) on a terminal with this number of columns.

    Args:
        environment: variables that are set in addition to those of the tests.
        watch: called with the lines of the screen whenever they have changed.
    """
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, columns, 0, 0))
    screen = pyte.Screen(columns, _LINES)
    stream = pyte.ByteStream(screen)
    unset = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"}
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1", **(environment or {})}
    process = Python(*arguments, cwd=cwd, environment=variables, output=Path(os.ttyname(its)))
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None
            while select.select([own], [], [], 0 if ended else 0.05)[0]:
                stream.feed(os.read(own, 65536))
                watch(_lines(screen))
        code = process.wait(timeout=10)
    finally:
        os.close(its)
        os.close(own)
    colours = {cell.fg for row in screen.buffer.values() for cell in row.values()} - {"default"}
    return Seen(_lines(screen), frozenset(colours), code)


def _lines(screen: pyte.Screen) -> list[str]:
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines
