"""Paired comparison: the same samples with the same noise before and after training, compared frame by frame.

A mean over the scored frames is misleading if their number changes: a model that hides the face in its worst frames has
a better mean, but shows the person less. The comparison therefore uses frames that were scored both before and after;
in addition, all frames are compared, with 0 for frames that could not be scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Values = Sequence[float | None]
"""Numbers; None or NaN if missing."""

Missing = Literal["exclude", "zero"]
"""Treatment of frames without a score on one side: exclude them, or count them as 0."""


@dataclass(frozen=True)
class PairedGain:
    """The change of one measure.

    Attributes:
        differences: after - before for each sample; NaN if it was not scored on both sides.
        frames: number of frame pairs that these are means of; None if whole videos were compared.
    """

    differences: tuple[float, ...]
    frames: int | None = None

    @property
    def found(self) -> list[float]:
        """Return the differences that are not NaN."""
        return [difference for difference in self.differences if not math.isnan(difference)]

    @property
    def starts(self) -> int:
        """Return the number of compared samples."""
        return len(self.found)

    @property
    def starts_up(self) -> int:
        """Return the number of samples with an increase."""
        return sum(difference > 0 for difference in self.found)

    @property
    def gain(self) -> float:
        """Return the mean difference; NaN if nothing was compared."""
        return math.fsum(self.found) / self.starts if self.found else math.nan

    @property
    def error(self) -> float:
        """Return the standard error of the gain over samples; NaN with fewer than two."""
        if self.starts < 2:
            return math.nan
        spread = math.fsum((difference - self.gain) ** 2 for difference in self.found) / (self.starts - 1)
        return math.sqrt(spread / self.starts)


def pair_videos(before: Values, after: Values) -> PairedGain:
    """Compare one number per sample.

    Raises:
        ValueError: the numbers of samples differ.
    """
    pairs = zip(_numbers(before), _numbers(after), strict=True)
    return PairedGain(tuple(a - b for b, a in pairs))


def pair_frames(before: Sequence[Values], after: Sequence[Values], missing: Missing = "exclude") -> PairedGain:
    """Compare one number per frame of each sample: the mean over samples of the mean over frames.

    Args:
        before, after: for each sample, the scores of its frames.
        missing: `exclude` compares the frames with a score on both sides. `zero` compares all of them, with 0 for
            missing scores; a sample without any score on either side is still excluded.
    Raises:
        ValueError: the numbers of samples, or of frames of a sample, differ.
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
