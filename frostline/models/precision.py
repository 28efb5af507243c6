"""Floating-point types of weights, with the names used in settings and flags."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from frostline.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_precision(name: str) -> torch.dtype:
    """Return the torch dtype of a precision.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown precision {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def precision_name(dtype: object) -> str:
    """Return the precision of a torch dtype: the inverse of `parse_precision`.

    Raises:
        ConfigError: the dtype is not one of `DTYPES`.
    """
    for name, known in DTYPES.items():
        if dtype is known:
            return name
    raise ConfigError(f"dtype: weights cannot be {dtype!r}: use one of {', '.join(map(str, DTYPES.values()))}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device; None if it is off, or not supported by the device (meta)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
