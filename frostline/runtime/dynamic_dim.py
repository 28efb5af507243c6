"""Dynamic dimensions of engines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Size = Literal["min", "opt", "max"]


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension: `multiple * n` with `min <= n <= max`.

    Dimensions of the same name share n: the height of a video may be 16 n, and the height of its latents 2 n.

    Attributes:
        whole: the multiple of the quantity that `name` refers to; 16 for the height of a video.
    """

    name: str
    min: int
    opt: int
    max: int
    multiple: int = 1
    whole: int = 1

    @property
    def axis(self) -> str:
        """Return the name of the axis: `height` for 16 n if `whole` is 16, and `height/8` for 2 n."""
        return self.axis_of(self.multiple)

    def axis_of(self, multiple: int) -> str:
        """Return the name of an axis of `multiple * n`."""
        divisor = math.gcd(multiple, self.whole)
        times, parts = multiple // divisor, self.whole // divisor
        return ("" if times == 1 else f"{times}*") + self.name + ("" if parts == 1 else f"/{parts}")

    def admits(self, extent: int) -> bool:
        """Return whether `extent` is in the range."""
        blocks, rest = divmod(extent, self.multiple)
        return rest == 0 and self.min <= blocks <= self.max

    def at(self, size: Size) -> int:
        """Return the size at the minimum, the typical value, or the maximum of the range."""
        return self.multiple * getattr(self, size)
