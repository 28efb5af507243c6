"""Compute the verdict on a run: do the judges confirm the gain of the reward, or do they fall while it rises?

The verdict is a pure function of the lines of `validation.jsonl`. It reads these fields of a line:

- `step`: number of completed optimizer steps.
- `starts`: `{measure: [value for each sample]}`.
- `frames`: `{measure: [[value for each frame] for each sample]}`, for measures of single frames.
- `rewards`: names of the measures that are trained on.
- `judges`: names of the measures of judges, which are not used in training.
- `pairing`: `{measure: key}`; two lines are comparable in a measure if its keys are equal.

Each measure is compared with the first line that contains it, sample by sample, and frame by frame if both contain
frames. It **rises** or **falls** if the mean difference exceeds two standard errors over samples. With fewer than three
samples, for which the standard error is meaningless, all of them must have changed in that direction. A measure also
falls if its mean falls when frames that could not be scored count as 0: hiding frames with a low score is not a gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from frostline.rewards.paired import PairedGain, pair_frames, pair_videos

Line = Mapping[str, Any]
Direction = Literal["rises", "falls", "does not change", "cannot be compared"]
Kind = Literal["first", "agree", "hacking", "falls", "no gain", "unmoved", "unjudged"]

ERRORS = 2.0
"""Standard errors that a mean difference must exceed."""

_FEW_STARTS = 3
# Changes up to this fraction of the largest value are rounding: engines and devices round differently.
_ROUNDING = 1e-5
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Change:
    """The change of a measure since the first validation that contains it.

    Attributes:
        since: the step of that validation.
        gain: the change over the frames scored in both validations, or over whole videos.
        gain_missing_zero: the change with 0 for frames that could not be scored; None for whole videos.
        direction: direction of `gain`; also `falls` if only `gain_missing_zero` falls, in which case `hidden` is set.
    """

    name: str
    since: int
    gain: PairedGain
    gain_missing_zero: PairedGain | None
    direction: Direction
    hidden: bool = False

    def as_line(self) -> dict[str, Any]:
        """Return the entry in `validation.jsonl`."""
        gain, zero = self.gain, self.gain_missing_zero
        line = {"since": self.since, "gain": _or_none(gain.gain), "error": _or_none(gain.error), "starts": gain.starts}
        line |= {"starts_up": gain.starts_up, "direction": self.direction}
        return line if zero is None else {**line, "frames": gain.frames, "gain_missing_zero": _or_none(zero.gain)}


@dataclass(frozen=True)
class Verdict:
    """The result of all validations so far.

    Attributes:
        kind: `first`: nothing to compare yet; `agree`: rewards and judges rise; `hacking`: a reward rises while a judge
            falls; `falls`: a judge falls, and no reward rises; `no gain`: no reward rises; `unmoved`: a reward rises,
            but not all judges; `unjudged`: a reward rises, and there is no judge.
        sentence: the verdict as a sentence; empty for `first`.
        falling: for each falling judge, the step since which it falls.
        falling_in_row: number of consecutive validations, up to the latest, in which a judge falls.
    """

    kind: Kind
    sentence: str
    falling: Mapping[str, int]
    falling_in_row: int = 0

    @property
    def is_bad(self) -> bool:
        """Return whether a judge falls."""
        return bool(self.falling)

    def as_line(self) -> dict[str, Any]:
        """Return the entry in `validation.jsonl`."""
        falling = dict(self.falling)
        return {"kind": self.kind, "says": self.sentence, "falling": falling, "falling_in_row": self.falling_in_row}


def change_of(lines: Sequence[Line], name: str) -> Change | None:
    """Compare a measure of the last line with the first line that contains it; None if the last is the first."""
    last = lines[-1]
    first = next((line for line in lines if _pairs(line, last, name)), last)
    if first is last:
        return None
    before, after = first["starts"][name], last["starts"][name]
    frames_before, frames_after = (line.get("frames", {}).get(name) for line in (first, last))
    if frames_before is None or frames_after is None or not _fit(frames_before, frames_after):
        gain, zero = pair_videos(before, after), None
    else:
        gain = pair_frames(frames_before, frames_after)
        zero = pair_frames(frames_before, frames_after, missing="zero")
    size = max((abs(value) for value in (*before, *after) if value is not None and math.isfinite(value)), default=0.0)
    heading = direction(gain, negligible=_ROUNDING * size)
    hidden = zero is not None and heading != "falls" and direction(zero, negligible=_ROUNDING * size) == "falls"
    return Change(name, int(first["step"]), gain, zero, "falls" if hidden else heading, hidden)


def changes_of(lines: Sequence[Line]) -> dict[str, Change]:
    """Compare every measure of the last line, without those that are new in it."""
    found = {name: change_of(lines, name) for name in lines[-1].get("starts", {})}
    return {name: change for name, change in found.items() if change is not None}


def direction(gain: PairedGain, negligible: float = 0.0) -> Direction:
    """Return the direction of a significant change; see the module's docstring.

    Args:
        negligible: a mean difference up to this is considered rounding.
    """
    if gain.starts == 0:
        return "cannot be compared"
    if gain.starts < _FEW_STARTS:
        certain = gain.starts_up in (0, gain.starts) and 0 not in gain.found
    else:
        certain = abs(gain.gain) > ERRORS * gain.error
    if not certain or abs(gain.gain) <= negligible:
        return "does not change"
    return "rises" if gain.gain > 0 else "falls"


def verdict(lines: Sequence[Line]) -> Verdict:
    """Return the verdict on a run from its validations so far.

    Args:
        lines: lines of `validation.jsonl`, at least one.
    """
    rewards, judges = ([*lines[-1].get(role, ())] for role in ("rewards", "judges"))
    changes = {name: change_of(lines, name) for name in (*rewards, *judges)}
    falling = {name: step for name in judges if (step := _falls_since(lines, name)) is not None}
    found = {name: change for name, change in changes.items() if change is not None}
    if not any(name in found for name in rewards):
        return Verdict("first", "", {})
    up = [name for name in rewards if name in found and found[name].direction == "rises"]
    others = [name for name in judges if name not in falling]
    rising = [name for name in others if name in found and found[name].direction == "rises"]
    in_row = 0
    while _any_falls(lines[: len(lines) - in_row], judges):
        in_row += 1

    def said(kind: Kind, sentence: str) -> Verdict:
        return Verdict(kind, sentence, falling, in_row)

    if falling and up:
        return said(
            "hacking",
            f"the reward rises while a judge falls, reward hacking? {_said(up, found)}, {_falls(falling, found)}.",
        )
    if falling:
        return said("falls", f"{_falls(falling, found)}, and no reward rises: {_said(rewards, found)}.")
    if not up:
        return said("no gain", f"no gain yet: {_said([*rewards, *judges], found)}.")
    if not judges:
        return said(
            "unjudged", f"{_said(up, found)}; without a judge, this cannot be distinguished from reward hacking."
        )
    if rising == judges:
        return said("agree", f"gains agree: {_said([*up, *rising], found)}.")
    return said("unmoved", f"{_said(up, found)}; {_said(others, found)}.")


def with_verdict(lines: Sequence[Line], line: Line) -> tuple[dict[str, Any], Verdict]:
    """Return a new line of `validation.jsonl` with comparisons and verdict added, and the verdict.

    Args:
        lines: the previous lines.
    """
    known = [*lines, line]
    said = verdict(known)
    if said.kind == "first":
        return dict(line), said
    paired = {name: change.as_line() for name, change in changes_of(known).items()}
    return {**line, "paired": paired, "verdict": said.as_line()}, said


def _any_falls(lines: Sequence[Line], judges: Sequence[str]) -> bool:
    changes = [change_of(lines, name) for name in judges] if lines else []
    return any(change is not None and change.direction == "falls" for change in changes)


def _falls_since(lines: Sequence[Line], name: str) -> int | None:
    """Return the step of the first of the consecutive validations, up to the last, in which the measure falls."""
    since = None
    for end in range(len(lines), 0, -1):
        if not _any_falls(lines[:end], [name]):
            break
        since = int(lines[end - 1]["step"])
    return since


def _pairs(line: Line, other: Line, name: str) -> bool:
    """Return whether both lines contain the measure, the first with any number, for the same samples, noise and
    settings.
    """
    both = [each.get("starts", {}).get(name) for each in (line, other)]
    keys = {each.get("pairing", {}).get(name) for each in (line, other)}
    if None in both or len(both[0]) != len(both[1]) or len(keys) != 1:
        return False
    return any(value is not None and math.isfinite(value) for value in both[0])


def _fit(before: Sequence[Sequence[float | None]], after: Sequence[Sequence[float | None]]) -> bool:
    return [len(frames) for frames in before] == [len(frames) for frames in after]


def _said(names: Sequence[str], changes: Mapping[str, Change]) -> str:
    """Return text such as `face_score rises (+0.085 ± 0.011, 20 samples) and sharpness does not change (…)`."""
    return _listed(
        [
            f"{name} {changes[name].direction} ({_gain(changes[name])})" if name in changes else f"{name} is new"
            for name in names
        ]
    )


def _falls(falling: Mapping[str, int], changes: Mapping[str, Change]) -> str:
    return _listed([f"{name} falls since step {step} ({_gain(changes[name])})" for name, step in falling.items()])


def _gain(change: Change) -> str:
    zero = change.gain_missing_zero if change.hidden else None
    gain = zero or change.gain
    error = "" if math.isnan(gain.error) else f" ± {gain.error:.2g}"
    how = "" if zero is None else ", with 0 for frames that can no longer be scored"
    return f"{signed(gain.gain)}{error}, {gain.starts} sample{'s' if gain.starts != 1 else ''}{how}"


def signed(value: float) -> str:
    """Format a number with sign and three significant digits: +0.085, −0.0031."""
    if math.isnan(value):
        return "n/a"
    digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{'+' if value >= 0 else _MINUS}{abs(value):.{min(digits, 6)}f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
