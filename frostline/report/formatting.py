"""Format numbers for reports."""

import math
from collections.abc import Mapping
from typing import Any, Literal

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

Trend = Literal["better", "worse", "same"]
"""Whether a change is an improvement."""


def number_of(mapping: Mapping[str, Any], name: str) -> float:
    """Return a value as a float; NaN if it is missing or None."""
    value = mapping.get(name)
    return math.nan if value is None else float(value)


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient; NaN if the denominator is 0."""
    return numerator / denominator if denominator else math.nan


def fixed(value: float | None, digits: int) -> str:
    """Return a number with `digits` decimal places; a dash if it is None or not finite."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", MINUS)


def milliseconds(value: float) -> str:
    """Return milliseconds with about three significant digits."""
    return fixed(value, 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0)


def signed(value: float, digits: int) -> str:
    """Return a change with its sign and `digits` decimal places; a dash if it is not finite."""
    if not math.isfinite(value):
        return NONE
    sign = "" if round(value, digits) == 0 else MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.{digits}f}"


def scientific(value: float) -> str:
    """Return a number in scientific notation, such as 3.1 × 10⁻⁷."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} {TIMES} 10{raised}"


def duration(seconds: float | None) -> str:
    """Return seconds as minutes and seconds; an empty string if the value is None or not finite."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """Return a JSON value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return NONE if value is None else str(value)
