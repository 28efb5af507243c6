"""Report errors of the disk of the engine store as engine errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import Timeout

from frostline.errors import EngineError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Convert any OSError, except the timeout of a lock, to an EngineError that begins with `doing`."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise _explain(doing, error) from error


@contextmanager
def full_disk_errors(doing: str) -> Iterator[None]:
    """Convert a full disk to an EngineError; pass on all other errors, which come from the builder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _explain(doing, error) from error


def _explain(doing: str, error: OSError) -> EngineError:
    if error.errno in _FULL:
        return EngineError(f"{doing}: the disk is full. Free some space, or use another disk with --engines-dir.")
    return EngineError(f"{doing}: {error}")
