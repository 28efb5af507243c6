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

# Maximum number of offloaded blocks with copies on the device: the block that computes, and the next one.
WINDOW = 2
# PyTorch rounds each allocation of pinned memory up to a power of two, up to twice the size of a tensor. Tensors are
# therefore packed into slabs of at most this size, unless a tensor is larger.
_SLAB_BYTES = 2**30
_ALIGNMENT = 512

BlockForward = Callable[..., Tensor]


def waiting_blocks(count: int, total: int) -> tuple[int, ...]:
    """Return the indices of the offloaded blocks, spread evenly, so that other blocks compute while each is copied.

    Args:
        count: number of offloaded blocks, limited to `total`.
        total: number of all blocks.
    """
    count = min(count, total)
    return tuple((index + 1) * total // count - 1 for index in range(count))


def waiting_names(network: nn.Module, count: int) -> frozenset[str]:
    """Return the names of all parameters of the offloaded blocks.

    Args:
        network: has its blocks in `blocks`, and no LoRA.
        count: see `waiting_blocks`.
    """
    blocks = network.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    places = waiting_blocks(count, len(blocks))
    return frozenset(f"blocks.{place}.{name}" for place in places for name, _ in blocks[place].named_parameters())


def placed(tensors: dict[str, Tensor], waiting: Collection[str], device: str | torch.device) -> dict[str, Tensor]:
    """Move tensors to a device, except the offloaded ones, which stay in main memory (pinned if the device is a GPU).

    Args:
        tensors: tensors in main memory, by name. The dict is emptied, so that at most one tensor exists twice.
        waiting: names of the offloaded tensors.
    """
    target = torch.device(device)
    slabs = Slabs(sum(tensor.nbytes for name, tensor in tensors.items() if name in waiting), target.type == "cuda")
    result = {}
    for name in [*tensors]:
        tensor = tensors.pop(name)
        result[name] = slabs.copy(tensor) if name in waiting else tensor.to(target)
    return result


class Slabs:
    """Main memory for tensors of a known total size, allocated in slabs whose sizes are powers of two.

    Args:
        nbytes: total size of all tensors that will be copied.
        pinned: whether to allocate pinned memory, from which a GPU can copy while it computes.
    """

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.allocated = 0
        self._missing, self._pinned = nbytes, pinned
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a dense copy of a tensor in this memory; the tensor can have any dtype and device."""
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
    """Run the blocks of a denoiser; the weights of offloaded blocks are copied from main memory when they are needed.

    The parameters of offloaded blocks are the same objects as before and stay in main memory. Such a block computes
    with copies on the device of its input, which are freed afterwards. While a block computes, the weights of the next
    offloaded block are copied on a separate stream: the following one in forward, the preceding one in backward. At
    most `WINDOW` blocks therefore have copies on the device at a time. LoRA matrices stay on the device.

    Args:
        blocks: the blocks of the denoiser, in the order in which they run.
        count: number of offloaded blocks; see `waiting_blocks`.
    """

    def __init__(self, blocks: Iterable[nn.Module], count: int) -> None:
        self._blocks = [*blocks]
        self._places = {block: place for place, block in enumerate(self._blocks)}
        self._waiting = waiting_blocks(count, len(self._blocks))
        self._current: _Copies | None = None
        self._ahead: _Copies | None = None
        self._backward = False

    def weights(self) -> Iterator[nn.Parameter]:
        """Yield the frozen parameters of the offloaded blocks."""
        for place in self._waiting:
            yield from _frozen(self._blocks[place]).values()

    @property
    def window_bytes(self) -> int:
        """Return the maximum size of the copies on the device, in bytes."""
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
        """Return a handle for autograd to save instead of `tensor` if it is (a view of) a copied weight; else None."""
        current = self._current
        if current is None or (name := current.name_of(tensor)) is None:
            return None
        layout = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return SavedWeight(self, current.block, name, tensor.device, layout)

    def fetched(self, saved: SavedWeight) -> Tensor:
        """Return the tensor that `saved` replaces, copied again if necessary; called in backward."""
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
        """Return copies of an offloaded block's weights, and start to copy those of the next offloaded block."""
        if self._current is None or not self._current.are_of(block, device):
            self._current = None
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                # Also needed if these copies are not used: their memory is then freed and may be overwritten.
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
        """Start to copy the weights of the next offloaded block in forward, or of the previous one in backward."""
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

    Attributes:
        layout: shape, strides and storage offset of the tensor.
    """

    offload: BlockOffload
    block: nn.Module
    name: str
    device: torch.device
    layout: tuple[tuple[int, ...], tuple[int, ...], int]

    def fetched(self) -> Tensor:
        """Return the tensor, copied to the device again if necessary."""
        return self.offload.fetched(self)


class _Copies:
    """Copies of the frozen weights of a block on a device."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block, self._device = block, device
        weights = _frozen(block)
        # Allocated on the compute stream: copies can reuse memory that it frees, because the copy stream waits for it.
        self._tensors = {name: torch.empty_like(weight, device=device) for name, weight in weights.items()}
        self._names = {copy.untyped_storage().data_ptr(): name for name, copy in self._tensors.items()}
        self._ready: torch.cuda.Event | None = None
        with self._copying():
            for name, copy in self._tensors.items():
                copy.copy_(weights[name], non_blocking=True)

    def are_of(self, block: nn.Module, device: torch.device) -> bool:
        return self.block is block and self._device == device

    def wait(self) -> None:
        """Make the current stream wait for the copies."""
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
            self._ready = None

    def by_name(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + name: copy for name, copy in self._tensors.items()}

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of the weight that `tensor` is a copy of, or a view of a copy of; None if there is none."""
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
    """Call `compute(block, …)` in `forward`, so that `functional_call` can replace the block's weights."""

    def __init__(self, compute: BlockForward, block: nn.Module) -> None:
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, *inputs: Any) -> Tensor:
        return self.compute(self.block, *inputs)


def _frozen(block: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in block.named_parameters() if not parameter.requires_grad}
