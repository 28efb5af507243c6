"""Distinguish out-of-memory errors from all other errors."""

from frostline.errors import EngineMemoryError

# On the CPU, torch does not raise its OutOfMemoryError, but a RuntimeError whose message has one of these words.
_WORDS = ("DefaultCPUAllocator", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that main memory or GPU memory ran out."""
    if isinstance(error, (MemoryError, EngineMemoryError)):
        return True
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
