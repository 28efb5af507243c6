"""Run long native calls in their own thread, so that Ctrl-C and other exceptions reach the caller at once.

Python runs signal handlers in the main thread between two bytecode instructions; a native call there delays them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_Result = TypeVar("_Result")

# Maximum time to wait for cancelled work, because the user who pressed Ctrl-C is waiting.
_PATIENCE_SECONDS = 0.5
_POLL_SECONDS = 0.1

_left_behind: list[threading.Thread] = []


def run_interruptibly(
    work: Callable[[], _Result], cancelled: threading.Event, poll: Callable[[], None] = lambda: None
) -> _Result:
    """Return the result of `work`, which runs in its own thread.

    If `poll` or a signal handler raises, `cancelled` is set, and the exception is raised as soon as `work` has ended.
    If this takes too long, it is raised earlier, and `work_left_behind` returns True until `work` has ended.

    Args:
        cancelled: `work` should end when this is set.
        poll: called in this thread several times a second, and once when the work is done.
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
    """Return whether native code of an interrupted call still runs; a normal exit would then crash the process."""
    return any(thread.is_alive() for thread in _left_behind)
