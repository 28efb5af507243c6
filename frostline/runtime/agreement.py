"""Choose the same backend for a stage in all processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frostline.errors import EngineError


def several_processes() -> bool:
    """Return whether this is one of several processes of a training run."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def disagreement(backend: str, load: Callable[[], object] | None) -> str | None:
    """Agree with all other processes on the backend of a stage. A collective call: every process has to make it.

    Args:
        load: loads the engine; its `EngineError` is reported to all processes. None if there is nothing to load.
    Returns:
        None if all processes name the same backend and none failed; otherwise the reason, the same in all of them.
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
