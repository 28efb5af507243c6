"""Memory of CPU tensors: keep the memory that one training step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Keep freed memory in the process until it ends.

    By default, glibc returns the memory of large tensors to the system at once, and the system zeroes each page when it
    is allocated again. This takes a considerable part of a training step on the CPU. With this setting, the process
    keeps its peak memory.

    Returns:
        Whether it took effect; only glibc is supported.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _TOP_PAD, _M_MMAP_MAX: 0}
    taken = [bool(mallopt(option, value)) for option, value in options.items()]
    return all(taken)
