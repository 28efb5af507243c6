"""Names of the two denoisers of a mixture-of-experts model, for settings and options; imports no settings."""

from typing import Literal, TypeAlias

ExpertName: TypeAlias = Literal["low", "high"]
"""A denoiser, named by its noise level."""
Experts: TypeAlias = Literal["low", "high", "both"]
