"""The log: on the console as much as the user wants to see, and all of it in a file."""

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
    """Prints log lines on the console of standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            style = _STYLES.get(record.levelno)
            named = Text("") if style is None else Text(f"{record.levelname.lower()}: ", style)
            error_console().print(named + Text(text), highlight=False)
        except Exception:
            self.handleError(record)


def log_to_console(level: int) -> None:
    """Show messages of frostline from this level on, and warnings of other packages; in place of an earlier call.

    Loggers of frostline let all pass: the handlers decide what they take.
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
    """Whether messages of this level are on the console; yes where no log was set up."""
    levels = [handler.level for handler in logging.getLogger().handlers if isinstance(handler, ConsoleLog)]
    return all(level >= shown for shown in levels)


class LogFile(logging.Handler):
    """A file of all messages, with time and logger; keeps them in memory until it is told where the file is.

    A file that can no longer be written is given up with one warning: a log does not end a run.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(_Lines("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        self._waiting: list[logging.LogRecord] = []
        self._file: TextIO | None = None
        self._given_up = False

    def open(self, path: Path) -> None:
        """Append what was kept to the file, and from now on each message."""
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
                log.debug("the log file was not closed: %s", error)
        super().close()

    def _give_up(self, error: OSError) -> None:
        # First: the warning comes here too.
        self._given_up, file, self._file = True, self._file, None
        log.warning("the log file cannot be written, the run goes on without it: %s", error)
        if file is not None:
            try:
                file.close()
            except OSError as again:
                log.debug("the log file was not closed: %s", again)


@contextmanager
def logged_to_file(active: bool = True) -> Iterator[LogFile]:
    """Within the block all messages of frostline go to a `LogFile`, also the error that ends the block.

    Args:
        active: whether this process writes a log; of several, the first does.
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
        # The console gets it from whoever catches it.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, "%s", (error,), sys.exc_info()))
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


class _Lines(logging.Formatter):
    """Escapes control characters of names, as the console does."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
