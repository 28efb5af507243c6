"""The least time that a call can take on a device: its operations and bytes over what the device was measured to do.

Operations are those of matrix products, convolutions and attention, two for each multiply-add. Bytes are the fewest
that must move: weights and inputs read once, outputs written once. What lies between, of any size, could stay on the
chip, so that the larger of both times is a bound, and no promise.
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
    """What a device does at its best, measured: in operations and bytes a second."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What one call must do."""

    operations: int
    bytes: int

    def milliseconds(self, ceilings: Ceilings) -> float:
        """The bound."""
        return 1000 * max(self.operations / ceilings.operations, self.bytes / ceilings.bytes)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """By a product of two large matrices of random numbers, and a copy that no cache holds."""
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
    """What the call does, of `inputs` and `weights` that it reads."""
    with FlopCounterMode(display=False, custom_mapping={_ONEDNN: _onednn_operations}) as counter:
        outputs = [*run()]
    tensors = [*outputs, *inputs, *{weight.data_ptr(): weight for weight in weights}.values()]
    return Work(counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _onednn_operations(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    """Of a convolution that is sent to oneDNN by name, which torch's counter does not know; by shapes."""
    return conv_flop_count(x, weight, out_shape)
