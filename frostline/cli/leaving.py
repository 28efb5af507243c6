"""End the process."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from frostline.runtime.interruptible import work_left_behind

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))


def leave(code: int | str | None) -> NoReturn:
    """Exit; skip Python's shutdown if native code of an interrupted build is still running."""
    if work_left_behind():
        _end(code)
    sys.exit(code)


def at_once(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a command so that an interrupt ends the process right after the cleanup.

    Python would first free the tracer and its graphs, which takes seconds and is not needed.
    """

    @functools.wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except SystemExit as leaving:
            if leaving.code in _INTERRUPTED:
                _end(leaving.code)
            raise

    return run


def _end(code: int | str | None) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
