"""Distinguish engines that ran out of memory from engines that do not work."""

from __future__ import annotations

from collections.abc import Iterable

from frostline.allocation import is_out_of_memory
from frostline.errors import EngineError, EngineMemoryError


def engine_failure(what: str, error: Exception, signs: Iterable[str]) -> EngineError:
    """Return the error to raise for an error of a backend's library.

    Args:
        what: what failed, for the message.
        signs: substrings of the library's messages that mean out of memory, for errors whose type does not show it.
    """
    message = f"{what}: {error}"
    if is_out_of_memory(error) or any(sign in str(error) for sign in signs):
        return EngineMemoryError(message)
    return EngineError(message)
