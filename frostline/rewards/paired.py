"""Paired comparison: the same starts with the same noise before and after, held against each other frame by frame.

The mean over the frames that could be scored misleads where their number changes: a model that hides the face in its
worst frames has a better mean and shows the person less. So what is compared are frames that were scored both before
and after, and beside them all frames, with one that could not be scored as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Values = Sequence[float | None]
"""Numbers, with None or NaN where there is none."""

Missing = Literal["exclude", "zero"]
"""Frames that one side lacks: left out, or 0."""


@dataclass(frozen=True)
class PairedGain:
    """How much one measure changed.

    differences: after - before of each start, NaN of one that was not scored on both sides. frames: pairs of frames
    that these are means of; None where whole videos were compared.
    """

    differences: tuple[float, ...]
    frames: int | None = None

    @property
    def found(self) -> list[float]:
        """The differences that are numbers."""
        return [difference for difference in self.differences if not math.isnan(difference)]

    @property
    def starts(self) -> int:
        """How many starts were compared."""
        return len(self.found)

    @property
    def starts_up(self) -> int:
        """How many of them rose."""
        return sum(difference > 0 for difference in self.found)

    @property
    def gain(self) -> float:
        """The mean difference; NaN where nothing was compared."""
        return math.fsum(self.found) / self.starts if self.found else math.nan

    @property
    def error(self) -> float:
        """The standard error of the gain, from the spread over starts; NaN with fewer than two of them."""
        if self.starts < 2:
            return math.nan
        spread = math.fsum((difference - self.gain) ** 2 for difference in self.found) / (self.starts - 1)
        return math.sqrt(spread / self.starts)


def pair_videos(before: Values, after: Values) -> PairedGain:
    """Compare one number of each start.

    Raises:
        ValueError: the starts differ in number.
    """
    pairs = zip(_numbers(before), _numbers(after), strict=True)
    return PairedGain(tuple(a - b for b, a in pairs))


def pair_frames(before: Sequence[Values], after: Sequence[Values], missing: Missing = "exclude") -> PairedGain:
    """Compare one number of each frame of each start: the mean over starts of the mean over frames.

    Args:
        before, after: of each start the scores of its frames.
        missing: `exclude` compares the frames that have a score on both sides. `zero` compares all of them, 0 standing
            for a score that is missing; of a start without any score on either side there is still nothing to say.
    Raises:
        ValueError: starts, or frames of a start, differ in number.
    """
    differences, frames = [], 0
    for one, other in zip(before, after, strict=True):
        pairs = [*zip(_numbers(one), _numbers(other), strict=True)]
        if missing == "zero":
            scored = any(not math.isnan(value) for pair in pairs for value in pair)
            pairs = [(_or_zero(b), _or_zero(a)) for b, a in pairs] if scored else []
        found = [a - b for b, a in pairs if not math.isnan(a - b)]
        differences.append(math.fsum(found) / len(found) if found else math.nan)
        frames += len(found)
    return PairedGain(tuple(differences), frames)


def _numbers(values: Values) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
