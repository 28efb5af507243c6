"""Native calls that take minutes, in a thread of their own: Ctrl-C and other exceptions reach the caller at once.

Python runs signal handlers in the main thread, between two of its instructions: while native code runs there, none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_Result = TypeVar("_Result")

# How long work that was cancelled is waited for: who pressed Ctrl-C waits as well.
_PATIENCE_SECONDS = 0.5
_POLL_SECONDS = 0.1

_left_behind: list[threading.Thread] = []


def run_interruptibly(
    work: Callable[[], _Result], cancelled: threading.Event, poll: Callable[[], None] = lambda: None
) -> _Result:
    """Return the result of `work`, which runs in a thread.

    Where `poll` or a signal handler raises, `cancelled` is set, and the exception goes on as soon as `work` has ended;
    or without it, if that takes too long: `work_left_behind` then says so.

    Args:
        cancelled: what `work` should end for.
        poll: called here several times a second, and once when the work is done.
    """
    future: Future[_Result] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=target, name="interruptible", daemon=True)
    thread.start()
    try:
        while not wait([future], _POLL_SECONDS).done:
            poll()
        poll()
    except BaseException:
        cancelled.set()
        thread.join(_PATIENCE_SECONDS)
        if thread.is_alive():
            _left_behind.append(thread)
        raise
    return future.result()


def work_left_behind() -> bool:
    """Return whether native code still runs for a caller that was interrupted: an orderly exit would pull it down."""
    return any(thread.is_alive() for thread in _left_behind)
