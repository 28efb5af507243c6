"""Measure the memory of a computation by counting its tensors, real or on the meta device."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every storage that operators allocate within the block, until it is freed.

    On the meta device, nothing is computed or allocated, and the count equals that of a real run. Only tensors are
    counted, not the workspace of kernels or the memory that an allocator reserves.

    Args:
        existing: tensors that existed before, which are not counted.
    Attributes:
        live: number of bytes allocated now.
        peak: maximum number of bytes allocated since the start or the last `restart`.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}
        for tensor in existing:
            self._note(tensor, counts=False)

    def restart(self) -> None:
        """Reset the peak to the bytes allocated now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(result, counts=True)
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, counts=True)
        return result

    def _note(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        # A storage is freed together with its Python object.
        self._known[key] = weakref.ref(storage, functools.partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self.live -= size


def tensors_of(*modules: torch.nn.Module) -> Iterable[Tensor]:
    """Yield all parameters and buffers of modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
