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


def precision_name(dtype: object) -> str:
    """The name of this type: the inverse of `parse_precision`.

    Raises:
        ConfigError: weights cannot be of this type.
    """
    for name, known in DTYPES.items():
        if dtype is known:
            return name
    raise ConfigError(f"dtype: weights cannot be {dtype!r}: use one of {', '.join(map(str, DTYPES.values()))}")
