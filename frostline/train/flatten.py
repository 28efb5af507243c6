"""Mappings in mappings, as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """`{"lora": {"rank": 8}}` as `{"lora.rank": 8}`; what is no mapping stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}{separator}{inner}": item for inner, item in flatten(value, separator).items()}
        else:
            flat[name] = value
    return flat
