"""Share the state of a training run between the process that started it and its workers."""

from __future__ import annotations

import signal

from frostline.errors import FrostlineError


class RunState:
    """Store the state of a run. Runs as a separate actor, which outlives the workers."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._begun = False
        self._failure: FrostlineError | None = None

    def ask_to_stop(self, number: int) -> None:
        """Ask the workers to finish their step, save a checkpoint and stop.

        Args:
            number: the number of the signal that the command received.
        """
        self._asked = number

    def stop_asked(self) -> int | None:
        """Return the number of the signal that stops the run, or None."""
        return self._asked

    def begin(self) -> None:
        """Record that the output folder belongs to this run."""
        self._begun = True

    def has_begun(self) -> bool:
        """Return whether the output folder belongs to this run; restarted workers then resume from it."""
        return self._begun

    def fail(self, error: FrostlineError) -> None:
        """Store an error that a restart would not fix; only the first error is kept."""
        self._failure = self._failure or error

    def failure(self) -> FrostlineError | None:
        """Return the error that ended the run, or None."""
        return self._failure


def signal_of(number: int | None) -> signal.Signals | None:
    """Return the signal with this number; None for None."""
    return None if number is None else signal.Signals(number)
