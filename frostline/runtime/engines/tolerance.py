"""How far an engine's outputs may be from PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True)
class Tolerance:
    """An output passes if `|engine - torch| <= atol + rtol * max|torch|` everywhere and the cosine is high enough."""

    # For manifests: Infinity is a legal bound, for which JSON has no number.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    atol: float
    rtol: float
    cosine: float

    def permits(self, other: Tolerance) -> bool:
        """Return whether whatever keeps the `other` bounds keeps these."""
        return self.atol >= other.atol and self.rtol >= other.rtol and self.cosine <= other.cosine
