"""Tell an engine that ran out of memory from one that does not work: only the latter is at fault."""

from __future__ import annotations

from collections.abc import Iterable

from frostline.allocation import is_out_of_memory
from frostline.errors import EngineError, EngineMemoryError


def engine_failure(what: str, error: Exception, signs: Iterable[str]) -> EngineError:
    """Return the error to raise for one that a backend's library raised.

    Args:
        what: happened, for the message.
        signs: what the library's messages contain, word for word, where memory ran out and nothing else says so.
    """
    message = f"{what}: {error}"
    if is_out_of_memory(error) or any(sign in str(error) for sign in signs):
        return EngineMemoryError(message)
    return EngineError(message)
