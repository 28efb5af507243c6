"""Rotate and mirror stored pictures to make them upright."""

import math

import numpy as np

Orientation = tuple[int, int, int, int]
"""Four entries (a, b, c, d) of a display matrix, each -1, 0 or 1: x' = a*x + c*y, y' = b*x + d*y, y downwards."""

UPRIGHT: Orientation = (1, 0, 0, 1)
BY_ROTATION: dict[int, Orientation] = {
    0: UPRIGHT,
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    270: (0, 1, -1, 0),
}
BY_EXIF: dict[int, Orientation] = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def upright(picture: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Rotate and mirror a `(H, W, 3)` picture by an orientation; the result is contiguous."""
    a, b, c, d = orientation
    if a == 0:
        picture, x_sign, y_sign = picture.swapaxes(0, 1), c, b
    else:
        x_sign, y_sign = a, d
    return np.ascontiguousarray(picture[::y_sign, ::x_sign])


def swaps_sides(orientation: Orientation) -> bool:
    """Return whether height and width are swapped."""
    return orientation[0] == 0


def rotation_degrees(orientation: Orientation) -> int:
    """Return the counter-clockwise rotation of an orientation, without its mirroring (left to right, applied
    afterwards).
    """
    a, b, c, d = orientation
    mirrored = a * d - b * c < 0
    return round(math.degrees(math.atan2(-b, -a if mirrored else a))) % 360
