"""Quantise weights to 8 or 4 bits, and dequantise them.

The results are bitwise equal to those of torchao (int8 and float8 weight-only, fp32 weights, one scale per output row)
and of bitsandbytes (NF4 in blocks of 64, absmax in fp32, no double quantisation). Only tensor operations are used,
which work on all devices, including the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Format:
    """A storage format of a weight (out, in).

    Attributes:
        quantise: returns codes and fp32 scales of a floating-point weight; on the meta device, only their shapes.
        dequantise: returns the fp32 weight from codes, scales, the shape of the weight, and the result of `table`.
        table: returns the lookup table from codes to values; None if the codes are themselves numbers.
    """

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantise: Callable[[Tensor, Tensor, tuple[int, int], Tensor | None], Tensor]
    table: Callable[[], Tensor | None] = lambda: None


def _quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (out, in) and a scale (out, 1) that maps the largest magnitude of each row to 127.5."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (weight * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8), scale


def _dequantise_int8(codes: Tensor, scale: Tensor, shape: tuple[int, int], table: Tensor | None) -> Tensor:
    return codes.float() * scale


def _quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn codes (out, in), as uint8, and a scale (out, 1) that maps each row's maximum to 448."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX
    # Avoid a division by zero for rows of zeros, whose scale is 0.
    scaled = (weight / torch.where(scale > 0, scale, 1.0)).clamp(-_FP8_MAX, _FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _dequantise_fp8(codes: Tensor, scale: Tensor, shape: tuple[int, int], table: Tensor | None) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scale


def _quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, 32) uint8, with two levels per byte, the first in the high bits, and absmax (blocks, 1).

    Each block contains 64 values in row-major order; the last block is padded with zeros.
    """
    flat = weight.float().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))).clamp(-1, 1)
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return nearest[:, ::2] << 4 | nearest[:, 1::2], absmax


def _dequantise_nf4(codes: Tensor, scale: Tensor, shape: tuple[int, int], table: Tensor | None) -> Tensor:
    assert table is not None
    # Before a layer is loaded, its codes are on the meta device, but its table is not.
    values = F.embedding(codes.int(), table.to(codes.device)).flatten(1) * scale
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)


def _nf4_pairs() -> Tensor:
    """Return the two levels (256, 2) of each byte."""
    levels = torch.tensor(NF4_LEVELS)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


FORMATS: Mapping[str, Format] = {
    "int8": Format(_quantise_int8, _dequantise_int8),
    "fp8": Format(_quantise_fp8, _dequantise_fp8),
    "nf4": Format(_quantise_nf4, _dequantise_nf4, _nf4_pairs),
}
