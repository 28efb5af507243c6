"""Rotary position embedding and timestep sinusoid of the Wan denoiser in real fp32 arithmetic.

diffsynth computes both in complex128 and float64, which neither ONNX nor TensorRT supports.
"""

import torch
from torch import Tensor

# A factor with at most this many mantissa bits times an integer up to 1024 is exact in fp32.
_EXACT_BITS = 13


def rope_table(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (positions, half) float32, of a complex table (positions, half)."""
    return frequencies.real.float().contiguous(), frequencies.imag.float().contiguous()


def grid_table(tables: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int]) -> Tensor:
    """Return one table for a (frames, height, width) token grid from the three axes' tables.

    Args:
        tables: for each axis, (positions, half of the axis).
    Returns:
        (frames * height * width, 1, head_dim / 2).
    """
    f, h, w = grid
    along_f = tables[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1)
    along_h = tables[1][:h].view(1, h, 1, -1).expand(f, h, w, -1)
    along_w = tables[2][:w].view(1, 1, w, -1).expand(f, h, w, -1)
    return torch.cat([along_f, along_h, along_w], dim=-1).reshape(f * h * w, 1, -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the interleaved pairs of every head.

    Args:
        x: (B, tokens, num_heads * head_dim).
        cos, sin: (tokens, 1, head_dim / 2), from `grid_table`.
    """
    even, odd = x.float().unflatten(2, (num_heads, -1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(2).to(x.dtype)


def sinusoid_frequencies(freq_dim: int) -> tuple[Tensor, Tensor]:
    """Return `10000^(-k / half)` as the sum of a part with few mantissa bits and the rest, each (freq_dim / 2,)
    float32.
    """
    half = freq_dim // 2
    exact = torch.pow(10000, -torch.arange(half, dtype=torch.float64).div(half))
    mantissa, exponent = torch.frexp(exact)
    coarse = torch.ldexp(torch.round(mantissa * 2**_EXACT_BITS) / 2**_EXACT_BITS, exponent)
    return coarse.float(), (exact - coarse).float()


def timestep_sinusoid(timestep: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """Return `[cos(t f), sin(t f)]` in fp32, within 1e-6 of float64 for t in [0, 1000].

    A plain fp32 product `t f` has errors of up to 6e-5 rad at t = 1000. Here the main part of the angle, `round(t) *
    coarse`, is exact, and the small rest is added with the angle-addition formulas.

    Args:
        timestep: (…,) float.
        coarse, fine: from `sinusoid_frequencies`.
    Returns:
        (…, freq_dim) float32.
    """
    timestep = timestep.float()[..., None]
    whole = torch.round(timestep)
    bulk = whole * coarse
    rest = whole * fine + (timestep - whole) * (coarse + fine)
    cos = torch.cos(bulk) * torch.cos(rest) - torch.sin(bulk) * torch.sin(rest)
    sin = torch.sin(bulk) * torch.cos(rest) + torch.cos(bulk) * torch.sin(rest)
    return torch.cat([cos, sin], dim=-1)
