"""Compute a lower bound on the time of a call from its operations and bytes, and the measured peak rates of a device.

Operations are those of matrix products, convolutions and attention; a multiply-add counts as two. Bytes are the minimum
memory traffic: weights and inputs are read once, and outputs are written once. Intermediate results could stay on the
chip. The bound is the larger of the time for the operations and the time for the bytes. It need not be reachable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from measuring import interleave
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

_ONEDNN = torch.ops.aten.mkldnn_convolution


@dataclass(frozen=True)
class Ceilings:
    """The measured peak rates of a device, in operations and bytes per second."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The operations and the memory traffic of one call."""

    operations: int
    bytes: int

    def milliseconds(self, ceilings: Ceilings) -> float:
        """Return the lower bound on the time in milliseconds."""
        return 1000 * max(self.operations / ceilings.operations, self.bytes / ceilings.bytes)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the peak rates with a product of two large random matrices, and a copy that is larger than all caches."""
    on_gpu = device.type == "cuda"
    side, length = (8192, 2**29) if on_gpu else (2048, 2**26)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    calls = {"product": partial(torch.mm, left, right, out=product), "copy": partial(target.copy_, source)}
    best = {name: min(samples) / 1000 for name, samples in interleave(calls, 5, device).items()}
    return Ceilings(operations=2 * side**3 / best["product"], bytes=2 * length * source.element_size() / best["copy"])


def measure_work(run: Callable[[], Iterable[Tensor]], inputs: Iterable[Tensor], weights: Iterable[Tensor]) -> Work:
    """Count the operations and bytes of a call that reads `inputs` and `weights` and returns its outputs."""
    with FlopCounterMode(display=False, custom_mapping={_ONEDNN: _onednn_operations}) as counter:
        outputs = [*run()]
    tensors = [*outputs, *inputs, *{weight.data_ptr(): weight for weight in weights}.values()]
    return Work(counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _onednn_operations(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    """Return the operations of `mkldnn_convolution`, which torch's counter does not support, from the shapes."""
    return conv_flop_count(x, weight, out_shape)
