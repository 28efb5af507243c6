"""Keep frozen weights of transformer blocks in main memory, and copy them to the device while other blocks compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# How many blocks' weights are on the device at most: those of the block at work, and of the next one.
WINDOW = 2
# PyTorch rounds pinned memory up to powers of two, each allocation by itself: up to twice of what a tensor needs.
_SLAB_BYTES = 2**30
_ALIGNMENT = 512

BlockForward = Callable[..., Tensor]


def waiting_blocks(count: int, total: int) -> tuple[int, ...]:
    """Return which of `total` blocks wait, spread evenly, so that others compute while each is copied.

    Args:
        count: of them; more than there are means all.
    """
    count = min(count, total)
    return tuple((index + 1) * total // count - 1 for index in range(count))


def waiting_names(network: nn.Module, count: int) -> frozenset[str]:
    """Return the names of the parameters that wait, of a network without LoRA whose blocks are `blocks`."""
    blocks = network.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    places = waiting_blocks(count, len(blocks))
    return frozenset(f"blocks.{place}.{name}" for place in places for name, _ in blocks[place].named_parameters())


def placed(tensors: dict[str, Tensor], waiting: Collection[str], device: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors on a device, but for those that wait, which are in main memory, pinned if it is a GPU's.

    Args:
        tensors: in main memory, by name; emptied, so that there are never two copies of all.
    """
    target = torch.device(device)
    slabs = Slabs(sum(tensor.nbytes for name, tensor in tensors.items() if name in waiting), target.type == "cuda")
    result = {}
    for name in [*tensors]:
        tensor = tensors.pop(name)
        result[name] = slabs.copy(tensor) if name in waiting else tensor.to(target)
    return result


class Slabs:
    """Main memory for tensors of so many bytes together, in pieces whose sizes are powers of two.

    Args:
        nbytes: of all tensors that will be copied.
        pinned: a GPU copies from pinned memory while it computes.
    """

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.allocated = 0
        self._missing, self._pinned = nbytes, pinned
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a dense copy of a tensor, of any type and on any device."""
        nbytes = tensor.nbytes
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > self._slab.numel():
            size = max(_power_of_two(nbytes), min(_SLAB_BYTES, _power_of_two(self._missing // 2 + 1)))
            self._slab, start = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned), 0
            self.allocated += size
        self._missing, self._used = self._missing - nbytes, start + nbytes
        copied = self._slab[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
        return copied.copy_(tensor)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length() if least > 1 else 1


class BlockOffload:
    """Runs the blocks of a denoiser, with copies of the weights that wait in main memory.

    The parameters are the same objects as before and stay in main memory. A block computes with copies on the device of
    its input, which are freed afterwards. While a block computes, the weights of the next waiting block are copied on a
    separate stream: the following block in forward, the preceding one in backward. So at most `WINDOW` blocks have
    copies on the device at a time. LoRA matrices stay on the device.

    Args:
        blocks: of the denoiser, in the order in which they run.
        count: how many of them wait.
    """

    def __init__(self, blocks: Iterable[nn.Module], count: int) -> None:
        self._blocks = [*blocks]
        self._places = {block: place for place, block in enumerate(self._blocks)}
        self._waiting = waiting_blocks(count, len(self._blocks))
        self._current: _Copies | None = None
        self._ahead: _Copies | None = None
        self._backward = False

    def weights(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that wait."""
        for place in self._waiting:
            yield from _frozen(self._blocks[place]).values()

    @property
    def window_bytes(self) -> int:
        """What the copies take on the device, at most."""
        sizes = sorted(sum(p.nbytes for p in _frozen(self._blocks[place]).values()) for place in self._waiting)
        return sum(sizes[-WINDOW:])

    def run(self, compute: BlockForward, block: nn.Module, x: Tensor, *inputs: Tensor) -> Tensor:
        """Return `compute(block, x, *inputs)`."""
        if x.is_meta:
            return compute(block, x, *inputs)
        if self._places[block] not in self._waiting:
            self._prefetch(block, x.device)
            return compute(block, x, *inputs)
        copies = self._take(block, x.device)
        try:
            return functional_call(_Block(compute, block), copies.by_name("block."), (x, *inputs))
        finally:
            self._current = None

    def contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """Return the contexts of forward and recomputation, for `torch.utils.checkpoint.checkpoint`."""
        return nullcontext(), self._in_backward()

    def saved(self, tensor: Tensor) -> SavedWeight | None:
        """Return what autograd is to save instead of a tensor if it is a copy of weights, or a view of one."""
        current = self._current
        if current is None or (name := current.name_of(tensor)) is None:
            return None
        layout = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return SavedWeight(self, current.block, name, tensor.device, layout)

    def fetched(self, saved: SavedWeight) -> Tensor:
        """Return, in backward, the tensor that was saved."""
        with self._in_backward():
            copy = self._take(saved.block, saved.device).by_name()[saved.name]
        return copy.as_strided(*saved.layout)

    @contextmanager
    def _in_backward(self) -> Iterator[None]:
        before, self._backward = self._backward, True
        try:
            yield
        finally:
            self._backward = before

    def _take(self, block: nn.Module, device: torch.device) -> _Copies:
        """Return the weights of a block that waits, and begin to copy those of the next one."""
        if self._current is None or not self._current.are_of(block, device):
            self._current = None
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                # Before its memory may be used for something else, too.
                ahead.wait()
            if ahead is None or not ahead.are_of(block, device):
                del ahead
                ahead = _Copies(block, device)
                ahead.wait()
            self._current = ahead
        current = self._current
        self._prefetch(block, device)
        return current

    def _prefetch(self, block: nn.Module, device: torch.device) -> None:
        """Begin to copy the weights of the block that waits next, behind or in backward before this one."""
        place = self._places[block]
        later = [each for each in self._waiting if (each < place if self._backward else each > place)]
        following = self._blocks[later[-1 if self._backward else 0]] if later else None
        if self._ahead is not None and (following is None or not self._ahead.are_of(following, device)):
            self._ahead.wait()
            self._ahead = None
        if following is not None and self._ahead is None:
            self._ahead = _Copies(following, device)


@dataclass(frozen=True)
class SavedWeight:
    """A handle that autograd saves instead of the copy of a weight.

    layout: shape, strides and storage offset of the tensor.
    """

    offload: BlockOffload
    block: nn.Module
    name: str
    device: torch.device
    layout: tuple[tuple[int, ...], tuple[int, ...], int]

    def fetched(self) -> Tensor:
        """Return the weight, copied again."""
        return self.offload.fetched(self)


class _Copies:
    """Copies of the frozen weights of a block on a device."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block, self._device = block, device
        weights = _frozen(block)
        # Allocated on the compute stream: the copies can reuse memory that it frees, because they wait for it.
        self._tensors = {name: torch.empty_like(weight, device=device) for name, weight in weights.items()}
        self._names = {copy.untyped_storage().data_ptr(): name for name, copy in self._tensors.items()}
        self._ready: torch.cuda.Event | None = None
        with self._copying():
            for name, copy in self._tensors.items():
                copy.copy_(weights[name], non_blocking=True)

    def are_of(self, block: nn.Module, device: torch.device) -> bool:
        return self.block is block and self._device == device

    def wait(self) -> None:
        """Let what is computed from now on wait for the copies."""
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
            self._ready = None

    def by_name(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + name: copy for name, copy in self._tensors.items()}

    def name_of(self, tensor: Tensor) -> str | None:
        """Return which weight a tensor is a copy of, or a view of one; None if of none."""
        return self._names.get(tensor.untyped_storage().data_ptr())

    @contextmanager
    def _copying(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        stream = _copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield
            ready = torch.cuda.Event()
            ready.record(stream)
            self._ready = ready


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Block(nn.Module):
    """A block as a module whose forward is a function of the block."""

    def __init__(self, compute: BlockForward, block: nn.Module) -> None:
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, *inputs: Any) -> Tensor:
        return self.compute(self.block, *inputs)


def _frozen(block: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in block.named_parameters() if not parameter.requires_grad}
