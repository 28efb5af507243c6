"""Make tiles that compare two numbers."""

import math

from frostline.report.formatting import Trend, fixed, signed
from frostline.report.page import Tile


def change_tile(
    label: str, before: float, after: float, digits: int, note: str, unit: str = "", trend: Trend = "same"
) -> Tile:
    """Return a tile with a value and its change.

    Args:
        label: the name of the value.
        before: the value before.
        after: the value after.
        digits: the number of decimal places.
        note: one sentence that explains the value.
        unit: the unit of the value.
        trend: whether the change is an improvement.
    """
    gain = after - before
    if math.isnan(gain):
        change, trend = "", "same"
    elif round(gain, digits) == 0:
        change, trend = "unchanged", "same"
    else:
        change = f"{signed(gain, digits)} {unit if unit != '%' else 'points'}".strip()
    return Tile(label, fixed(after, digits), unit, fixed(before, digits), change, trend, note)
