"""Flatten nested mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Convert `{"lora": {"rank": 8}}` to `{"lora.rank": 8}`; lists of mappings get numbers: `{"rewards.0.type": …}`.

    Other values are unchanged.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= {f"{name}{separator}{inner}": item for inner, item in flatten(value, separator).items()}
        else:
            flat[name] = value
    return flat
