"""How a command ends the process."""

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
    """Exit; without Python's own end where native code still runs for a build that was interrupted."""
    if work_left_behind():
        _end(code)
    sys.exit(code)


def at_once(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A command that ends as soon as it has cleaned up after an interrupt.

    Python takes seconds to tear down a tracer and its graphs, for nobody.
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
