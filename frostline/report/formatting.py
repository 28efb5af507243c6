"""Numbers as a reader wants them."""

import math
from collections.abc import Mapping
from typing import Any, Literal

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

Trend = Literal["better", "worse", "same"]
"""Whether a change is good news."""


def number_of(mapping: Mapping[str, Any], name: str) -> float:
    """A number, NaN where there is none."""
    value = mapping.get(name)
    return math.nan if value is None else float(value)


def ratio(numerator: float, denominator: float) -> float:
    """NaN where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point; a dash where there is none."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", MINUS)


def milliseconds(value: float) -> str:
    """With as many digits as are of use."""
    return fixed(value, 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0)


def signed(value: float, digits: int) -> str:
    """Return a change with its sign and so many digits after the point; a dash where there is none."""
    if not math.isfinite(value):
        return NONE
    sign = "" if round(value, digits) == 0 else MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.{digits}f}"


def scientific(value: float) -> str:
    """3.1e-07 as 3.1 × 10⁻⁷."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} {TIMES} 10{raised}"


def duration(seconds: float | None) -> str:
    """Seconds as minutes and seconds; nothing where there is no number."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """Any value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return NONE if value is None else str(value)
