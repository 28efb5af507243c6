"""Store the tensors that autograd saves for backward in main memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from frostline.models.block_offload import BlockOffload, SavedWeight

_Packed = SavedWeight | tuple[torch.device, Tensor]


def saved_in_main_memory(weights: Iterable[Tensor], offloads: Sequence[BlockOffload] = ()) -> saved_tensors_hooks:
    """Return a context that moves tensors saved for backward to pinned main memory until backward needs them.

    Unlike `torch.autograd.graph.save_on_cpu`, it does not copy the weights of every layer.

    Args:
        weights: tensors that are saved where they are, as are views of them.
        offloads: block offloads, whose copies of weights are not saved, but copied again in backward.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def pack(tensor: Tensor) -> _Packed:
        if (weight := _weight(tensor, offloads)) is not None:
            return weight
        if tensor.untyped_storage().data_ptr() in resident:
            return tensor.device, tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, copy

    return saved_tensors_hooks(pack, _unpack)


def saved_without_copies(offloads: Sequence[BlockOffload]) -> saved_tensors_hooks:
    """Return a context in which copies of offloaded weights are not saved, but copied again in backward."""
    return saved_tensors_hooks(lambda tensor: _weight(tensor, offloads) or (tensor.device, tensor), _unpack)


def _weight(tensor: Tensor, offloads: Sequence[BlockOffload]) -> SavedWeight | None:
    return next((weight for offload in offloads if (weight := offload.saved(tensor)) is not None), None)


def _unpack(packed: _Packed) -> Tensor:
    if isinstance(packed, SavedWeight):
        return packed.fetched()
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
