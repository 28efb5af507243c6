"""Extents that an engine leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = Literal["min", "opt", "max"]


@dataclass(frozen=True)
class Dimension:
    """A dimension that an engine leaves open: `multiple * n` with `min <= n <= max`.

    Dimensions of one name share n: a video's height may be 16 n while its latents' is 2 n.
    """

    name: str
    min: int
    opt: int
    max: int
    multiple: int = 1

    def admits(self, extent: int) -> bool:
        """Whether `extent` is in the range."""
        blocks, rest = divmod(extent, self.multiple)
        return rest == 0 and self.min <= blocks <= self.max

    def at(self, size: Size) -> int:
        """The extent at one end, or in the middle, of the range."""
        return self.multiple * getattr(self, size)
