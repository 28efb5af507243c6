"""Memory of tensors on the CPU: where a process trains, it keeps what one step gave back for the next."""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let the C library hold on to freed memory until the process ends.

    Unless told, glibc hands large tensors back to the system at once, and the system fills each page with zeros when
    it is next asked for: of a step on the CPU, a good part of the time. The most that the process held stays its own.

    Returns:
        Whether the C library knows how; other than glibc, they are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _TOP_PAD, _M_MMAP_MAX: 0}
    taken = [bool(mallopt(option, value)) for option, value in options.items()]
    return all(taken)
