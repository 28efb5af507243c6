"""The maximum deviation of an engine's outputs from PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True)
class Tolerance:
    """Limits of the deviation of an output.

    Attributes:
        atol, rtol: an output passes only if `|engine - torch| <= atol + rtol * max|torch|` everywhere.
        cosine: minimum cosine similarity.
    """

    # For manifests: Infinity is a valid bound, but not a valid JSON number.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    atol: float
    rtol: float
    cosine: float

    def permits(self, other: Tolerance) -> bool:
        """Return whether all outputs within the `other` bounds are within these bounds, too."""
        return self.atol >= other.atol and self.rtol >= other.rtol and self.cosine <= other.cosine
