"""Keep what backward needs in main memory, where a GPU's own does not hold it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_in_main_memory(weights: Iterable[Tensor]) -> saved_tensors_hooks:
    """Within the block, tensors saved for backward wait in main memory, pinned, and return when they are needed.

    `torch.autograd.graph.save_on_cpu` would copy the weights of every layer along with its activations.

    Args:
        weights: tensors that stay where they are, views of them too.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in resident:
            return tensor.device, tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, copy

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
