"""Communication between the processes of a distributed run; with one process, all functions return immediately."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Return the number of processes in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor without graph over all processes."""
    count = process_count()
    if count == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the value is true in any process."""
    if process_count() == 1:
        return flag
    said = torch.tensor(int(flag), device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def gather_from_processes(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, in every process."""
    count = process_count()
    if count == 1:
        return [value]
    gathered: list[Any] = [None] * count
    dist.all_gather_object(gathered, value)
    return gathered


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, in one all-reduce."""
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
