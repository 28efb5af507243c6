"""The floating-point types of weights, by the names that settings and flags use."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from frostline.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_precision(name: str) -> torch.dtype:
    """The type of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown precision {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
