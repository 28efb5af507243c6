"""Which videos workers have in hand: what a worker was at when it died is told from what is only slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from frostline.errors import FrostlineError

Key = tuple[str, str]
"""A video and its reference."""
MOST_DEATHS = 2
"""A video that had so many workers die on it is not given to another."""


class Ledger:
    """What all workers of a run are at. It runs as an actor of its own, which no worker takes along when it dies.

    Ray starts a dead actor again under the same id, so a worker that joins and has something in hand died on it.
    """

    def __init__(self) -> None:
        self._in_hand: dict[str, Counter[Key]] = {}
        self._deaths: Counter[Key] = Counter()
        self._seconds: Counter[str] = Counter()
        self._frames = 0
        self._failure: FrostlineError | None = None

    def join(self, worker: str) -> None:
        """A worker begins, perhaps once more: whatever it had in hand counts as one death each."""
        self._deaths.update({*self._in_hand.pop(worker, ())})

    def deaths(self, keys: Sequence[Key]) -> list[int]:
        """Return how often a worker died with each of these in hand."""
        return [self._deaths[key] for key in keys]

    def begin(self, worker: str, keys: Sequence[Key]) -> None:
        """A worker takes these in hand, in place of whatever it had."""
        self._in_hand[worker] = Counter(keys)

    def finish(self, worker: str, key: Key) -> None:
        """A worker has the result of one."""
        in_hand = self._in_hand.get(worker, Counter())
        in_hand[key] -= 1
        if in_hand[key] <= 0:
            del in_hand[key]

    def spend(self, frames: int, seconds: Mapping[str, float]) -> None:
        """Count frames that were scored, and seconds by stage and backend."""
        self._frames += frames
        for stage, spent in seconds.items():
            self._seconds[stage] += spent  # type: ignore[assignment]

    def spent(self) -> tuple[int, dict[str, float]]:
        """Return what all workers have counted."""
        return self._frames, dict(self._seconds)

    def fail(self, error: FrostlineError) -> None:
        """Keep the error that keeps a worker from scoring anything; the first stays."""
        self._failure = self._failure or error

    def failure(self) -> FrostlineError | None:
        """Return the error that a worker had, if one."""
        return self._failure
