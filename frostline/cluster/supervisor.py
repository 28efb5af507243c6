"""What the process that started a training run and its workers tell each other; Ray and a test may stand in between."""

from __future__ import annotations

import signal

from frostline.errors import FrostlineError


class RunState:
    """What is known of a run beyond the life of its workers. It runs as an actor of its own."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._begun = False
        self._failure: FrostlineError | None = None

    def ask_to_stop(self, number: int) -> None:
        """Ask the workers to save after their step, and to end."""
        self._asked = number

    def stop_asked(self) -> int | None:
        """Return the signal that the run is to end by, if any."""
        return self._asked

    def begin(self) -> None:
        """The run's folder is that of this run now."""
        self._begun = True

    def has_begun(self) -> bool:
        """Return whether the run's folder has been that of this run: then workers go on, and do not begin anew."""
        return self._begun

    def fail(self, error: FrostlineError) -> None:
        """Keep an error that would come again; the first stays."""
        self._failure = self._failure or error

    def failure(self) -> FrostlineError | None:
        """Return the error that ended the run, if one did."""
        return self._failure


def signal_of(number: int | None) -> signal.Signals | None:
    """Return a signal by its number."""
    return None if number is None else signal.Signals(number)
