"""Logging: selected levels on the console, all messages in a file."""

from __future__ import annotations

import logging
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.text import Text

from frostline.escaping import printable
from frostline.terminal.console import error_console

log = logging.getLogger(__name__)

_STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class ConsoleLog(logging.Handler):
    """Print log lines on the console of standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            style = _STYLES.get(record.levelno)
            named = Text("") if style is None else Text(f"{record.levelname.lower()}: ", style)
            error_console().print(named + Text(text), highlight=False)
        except Exception:
            self.handleError(record)


def log_to_console(level: int) -> None:
    """Show frostline's messages from `level` on, and warnings of other packages. Replaces the setup of an earlier call.

    frostline's loggers pass on all messages; the handlers filter them.
    """
    root = logging.getLogger()
    for handler in [*root.handlers]:
        if isinstance(handler, ConsoleLog):
            root.removeHandler(handler)
    handler = ConsoleLog(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("frostline").setLevel(logging.DEBUG)


def console_shows(level: int) -> bool:
    """Return whether messages of this level are shown on the console; True if logging is not set up."""
    levels = [handler.level for handler in logging.getLogger().handlers if isinstance(handler, ConsoleLog)]
    return all(level >= shown for shown in levels)


class LogFile(logging.Handler):
    """Write all messages with time and logger name to a file; keep them in memory until `open` is called.

    If the file can no longer be written, logging to it stops with one warning; the run continues.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(_Lines("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        self._waiting: list[logging.LogRecord] = []
        self._file: TextIO | None = None
        self._given_up = False

    def open(self, path: Path) -> None:
        """Write the kept messages to the file, and each message from now on."""
        with self.lock or threading.RLock():
            waiting, self._waiting = self._waiting, []
            try:
                self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                self._give_up(error)
            for record in waiting:
                self.emit(record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            if not self._given_up:
                self._waiting.append(record)
            return
        try:
            self._file.write(f"{self.format(record)}\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                log.debug("cannot close the log file: %s", error)
        super().close()

    def _give_up(self, error: OSError) -> None:
        # Set first: this handler also gets the warning.
        self._given_up, file, self._file = True, self._file, None
        log.warning("cannot write the log file; the run continues without it: %s", error)
        if file is not None:
            try:
                file.close()
            except OSError as again:
                log.debug("cannot close the log file: %s", again)


@contextmanager
def logged_to_file(active: bool = True) -> Iterator[LogFile]:
    """Write all messages of frostline within the block to a `LogFile`, including an exception that ends the block.

    Args:
        active: whether this process writes a log; in a distributed run, only the first process does.
    """
    handler, logger = LogFile(), logging.getLogger("frostline")
    if not active:
        yield handler
        return
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    log.debug("command: %s", shlex.join(sys.argv))
    try:
        yield handler
    except Exception as error:
        # The caller that catches the error prints it on the console.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, "%s", (error,), sys.exc_info()))
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


class _Lines(logging.Formatter):
    """Escape control characters, as the console does."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
