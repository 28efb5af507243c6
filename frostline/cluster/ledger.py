"""Track which videos each worker is processing, to find videos that crash workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from frostline.errors import FrostlineError

Key = tuple[str, str]
"""The paths or URLs of a video and its reference."""
MOST_DEATHS = 2
"""After this number of worker deaths, a video is not tried again."""


class Ledger:
    """Track what all workers of a run are processing. Runs as a separate actor, which outlives the workers.

    Ray restarts a dead actor under the same id. If a worker that joins has unfinished videos, it died while processing
    them.
    """

    def __init__(self) -> None:
        self._in_hand: dict[str, Counter[Key]] = {}
        self._deaths: Counter[Key] = Counter()
        self._seconds: Counter[str] = Counter()
        self._frames = 0
        self._failure: FrostlineError | None = None

    def join(self, worker: str) -> None:
        """Register a worker that starts or restarts; one death is counted for each of its unfinished videos."""
        self._deaths.update({*self._in_hand.pop(worker, ())})

    def deaths(self, keys: Sequence[Key]) -> list[int]:
        """Return the number of worker deaths for each of these videos."""
        return [self._deaths[key] for key in keys]

    def begin(self, worker: str, keys: Sequence[Key]) -> None:
        """Set the videos that a worker is processing; replaces the previous ones."""
        self._in_hand[worker] = Counter(keys)

    def finish(self, worker: str, key: Key) -> None:
        """Mark one video of a worker as finished."""
        in_hand = self._in_hand.get(worker, Counter())
        in_hand[key] -= 1
        if in_hand[key] <= 0:
            del in_hand[key]

    def spend(self, frames: int, seconds: Mapping[str, float]) -> None:
        """Add scored frames, and seconds by stage and backend, to the totals."""
        self._frames += frames
        for stage, spent in seconds.items():
            self._seconds[stage] += spent  # type: ignore[assignment]

    def spent(self) -> tuple[int, dict[str, float]]:
        """Return the total number of scored frames, and the total seconds by stage and backend."""
        return self._frames, dict(self._seconds)

    def fail(self, error: FrostlineError) -> None:
        """Store an error that prevents a worker from scoring any video; only the first error is kept."""
        self._failure = self._failure or error

    def failure(self) -> FrostlineError | None:
        """Return the first error of a worker, or None."""
        return self._failure
