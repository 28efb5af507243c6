"""Extents that an engine leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Size = Literal["min", "opt", "max"]


@dataclass(frozen=True)
class Dimension:
    """A dimension that an engine leaves open: `multiple * n` with `min <= n <= max`.

    Dimensions of one name share n: a video's height may be 16 n while its latents' is 2 n.

    whole: the multiple of the extent that `name` itself means, 16 for the height of a video.
    """

    name: str
    min: int
    opt: int
    max: int
    multiple: int = 1
    whole: int = 1

    @property
    def axis(self) -> str:
        """The name of such an axis: `height` for 16 n where `whole` is 16, and `height/8` for 2 n."""
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
        """Return the extent at one end, or in the middle, of the range."""
        return self.multiple * getattr(self, size)
