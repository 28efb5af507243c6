"""The two denoisers of a model with two experts, as settings and options name them; commands import no settings."""

from typing import Literal, TypeAlias

ExpertName: TypeAlias = Literal["low", "high"]
"""By the noise levels that it serves."""
Experts: TypeAlias = Literal["low", "high", "both"]
