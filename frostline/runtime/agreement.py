"""Let all processes of a distributed run serve a stage from the same backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frostline.errors import EngineError


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def disagreement(backend: str, load: Callable[[], object] | None) -> str | None:
    """Tell all processes which backend serves a stage here, and why it cannot if so; all have to call it.

    Args:
        load: loads the engine; what it raises as `EngineError` is told. None where there is nothing to load.
    Returns:
        None where all name the same backend and none failed; else why not, the same in all of them.
    """
    failure = None
    try:
        if load is not None:
            load()
    except EngineError as error:
        failure = str(error)
    distributed = torch.distributed
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (backend, failure))
    if all(each == (backend, None) for each in found):
        return None
    failures = [reason for _, reason in found if reason]
    return failures[0] if failures else "the processes have different engines"
