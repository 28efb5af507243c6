"""Native calls in a separate thread: what they return, and what happens if the caller is interrupted."""

import threading

import pytest

from frostline.runtime import interruptible
from frostline.runtime.interruptible import run_interruptibly, work_left_behind


def test_results_and_exceptions_are_the_works_own() -> None:
    polls = []
    assert run_interruptibly(lambda: threading.current_thread().name, threading.Event(), lambda: polls.append(1)) != (
        threading.main_thread().name
    )
    assert polls

    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_interruptibly(fail, threading.Event())


def interrupt() -> None:
    raise KeyboardInterrupt


def test_work_that_heeds_the_interrupt_has_ended() -> None:
    cancelled, ended = threading.Event(), threading.Event()

    def work() -> None:
        cancelled.wait()
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work, cancelled, interrupt)
    assert ended.is_set()
    assert not work_left_behind()


def test_work_that_does_not_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptible, "_PATIENCE_SECONDS", 0.01)
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(release.wait, threading.Event(), interrupt)
    assert work_left_behind()
    release.set()
    interruptible._left_behind[-1].join()
    assert not work_left_behind()


def test_what_is_told_last_is_polled() -> None:
    """Poll also if the work ends at once."""
    told: list[str] = []
    run_interruptibly(lambda: told.append("work"), threading.Event(), lambda: told.append("poll"))
    assert told[-1] == "poll"
