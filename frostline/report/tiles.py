"""Tiles that compare two numbers."""

import math

from frostline.report.formatting import Trend, fixed, signed
from frostline.report.page import Tile


def change_tile(
    label: str, before: float, after: float, digits: int, note: str, unit: str = "", trend: Trend = "same"
) -> Tile:
    """A figure that changed. trend: whether that is good news."""
    gain = after - before
    if math.isnan(gain):
        change, trend = "", "same"
    elif round(gain, digits) == 0:
        change, trend = "unchanged", "same"
    else:
        change = f"{signed(gain, digits)} {unit if unit != '%' else 'points'}".strip()
    return Tile(label, fixed(after, digits), unit, fixed(before, digits), change, trend, note)
