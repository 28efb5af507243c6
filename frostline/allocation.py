"""Tell running out of memory from every other error."""

from frostline.errors import EngineMemoryError

# On the CPU torch has no class for it, and says so in words.
_WORDS = ("DefaultCPUAllocator", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, main memory or a GPU's."""
    if isinstance(error, (MemoryError, EngineMemoryError)):
        return True
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
