"""What TensorRT says while it builds and runs: warnings, errors, and whether it was memory that it lacked."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from frostline.errors import EngineError, EngineMemoryError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Code 5 is `FAILED_ALLOCATION`; but TensorRT's allocators report memory that is not there under the codes of other
# faults: "Error Code 1: Cuda Runtime (out of memory)", "Error Code 2: OutOfMemory (no further information)".
OUT_OF_MEMORY = ("Error Code 5:", "out of memory", "OutOfMemory")
# How many messages an error holds.
_TOLD = 5


class Messages:
    """Listens to one builder or runtime, which is given `logger`.

    TensorRT calls it from native code, through which exceptions cannot propagate: an exception is stored, and `check`
    raises it.

    Not an `IErrorRecorder`, which would give codes instead of words: TensorRT-RTX 1.7.1 crashes as a network goes that
    was parsed while its builder had one.
    """

    def __init__(self, trt: Any) -> None:
        self.raised: BaseException | None = None
        # Whether an error was reported since `forget`: some functions have no other way to say so.
        self.failed = False
        self._latest: deque[str] = deque(maxlen=_TOLD)
        self._no_memory = False
        self.logger = _new_logger(trt, self)

    def forget(self) -> None:
        """Clear all messages, so that they are not reported with a later failure."""
        self.failed = self._no_memory = False
        self._latest.clear()

    def check(self) -> None:
        """Raise what a callback raised since the last check."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised

    def error(self, what: str) -> EngineError:
        """Return an error with what failed and TensorRT's latest messages.

        Raises:
            BaseException: what a callback raised, which is then the reason.
        """
        self.check()
        message = f"{what}: {'; '.join(self._latest) or 'it does not say why'}"
        return EngineMemoryError(message) if self._no_memory else EngineError(message)

    def guard(self, call: Callable[[], _Result], otherwise: _Result) -> _Result:
        """Return the result of `call`; if it raises, store the exception and return `otherwise` to TensorRT."""
        try:
            return call()
        except BaseException as error:
            self.raised = self.raised or error
            return otherwise

    def _heed(self, severity: Any, message: str, is_error: bool, is_warning: bool) -> None:
        if is_error:
            self.failed = True
            self._no_memory |= any(words in message for words in OUT_OF_MEMORY)
        if is_error or is_warning:
            self._latest.append(message)
        log.debug("%s: %s", severity.name, message)


def _new_logger(trt: Any, messages: Messages) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            is_error, is_warning = severity <= trt.ILogger.ERROR, severity <= trt.ILogger.WARNING
            messages.guard(lambda: messages._heed(severity, message, is_error, is_warning), None)

    return Logger()
