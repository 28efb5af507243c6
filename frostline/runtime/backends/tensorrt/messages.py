"""Collect TensorRT's warnings and errors, and detect whether memory ran out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from frostline.errors import EngineError, EngineMemoryError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Code 5 is `FAILED_ALLOCATION`, but TensorRT's allocators also report missing memory with other codes: "Error Code 1:
# Cuda Runtime (out of memory)", "Error Code 2: OutOfMemory (no further information)".
OUT_OF_MEMORY = ("Error Code 5:", "out of memory", "OutOfMemory")
# Maximum number of messages in an error.
_TOLD = 5


class Messages:
    """Collect the messages of one builder or runtime through its `logger`.

    TensorRT calls it from native code, through which exceptions cannot propagate: an exception is stored, and `check`
    raises it.

    An `IErrorRecorder`, which would also get error codes, is not used: TensorRT-RTX 1.7.1 crashes when a network is
    deleted that was parsed while its builder had one.
    """

    def __init__(self, trt: Any) -> None:
        self.raised: BaseException | None = None
        # Whether an error was reported since `forget`: some functions do not report errors in another way.
        self.failed = False
        self._latest: deque[str] = deque(maxlen=_TOLD)
        self._no_memory = False
        self.logger = _new_logger(trt, self)

    def forget(self) -> None:
        """Clear all messages, so that they are not reported with a later failure."""
        self.failed = self._no_memory = False
        self._latest.clear()

    def check(self) -> None:
        """Raise the exception that a callback raised since the last check, if any."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised

    def error(self, what: str) -> EngineError:
        """Return an error that contains what failed and TensorRT's latest messages.

        Raises:
            BaseException: an exception of a callback, which is then the cause.
        """
        self.check()
        message = f"{what}: {'; '.join(self._latest) or 'no reason given'}"
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
