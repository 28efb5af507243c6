"""Weights in 8 and 4 bits compared with the published formulas, and with the libraries that define the formats."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.models.quantization.storage import FORMATS, NF4_LEVELS

SHAPES = [(3, 5), (8, 64), (7, 96), (1, 1), (80, 192)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (0.05 * values).to(dtype)


def values(kind: str, stored: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    return FORMATS[kind].dequantise(*stored, shape, FORMATS[kind].table())


def by_hand(kind: str, given: Tensor) -> Tensor:
    """Compute the dequantised values with the formulas, one row or block at a time."""
    given = given.float()
    if kind == "nf4":
        found = []
        for block in given.flatten().split(64):
            largest = block.abs().max()
            found += [largest * min(NF4_LEVELS, key=lambda level: abs(float(x / largest) - level)) for x in block]
        return torch.stack(found).reshape(given.shape)
    rows = []
    for row in given:
        largest = row.abs().max()
        if kind == "int8":
            scale = largest / 127.5
            # Quotients can be half way between two steps, so multiply with the reciprocal, like torchao.
            rows.append((row * (1.0 / scale)).round().clamp(-128, 127) * scale)
        else:
            scale = largest / 448
            rows.append((row / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_values_are_those_of_the_formula(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = weight(shape, dtype)
    found = values(kind, FORMATS[kind].quantise(given), shape)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(kind, given), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5 / 127.5), ("fp8", 16 / 448), ("nf4", 0.1520)])
def test_the_error_is_at_most_half_a_step(kind: str, share: float) -> None:
    """Bound the error relative to the largest magnitude of the row or block.

    The steps of int8 are equal; 16 and 0.1520 are half of the widest steps of fp8 and NF4. int8 clamps 128 to 127,
    which also gives an error of half a step.
    """
    given = weight((64, 64))
    error = (values(kind, FORMATS[kind].quantise(given), (64, 64)) - given).abs().amax(1)
    assert (error <= share * given.abs().amax(1) * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_stay_zeros(kind: str) -> None:
    given = weight((4, 64))
    given[1] = 0
    found = values(kind, FORMATS[kind].quantise(given), (4, 64))
    assert (found[1] == 0).all() and found.isfinite().all()


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4)])
def test_bits_of_a_weight(kind: str, bits: int) -> None:
    codes, scale = FORMATS[kind].quantise(weight((96, 128)))
    assert codes.nbytes * 8 == bits * 96 * 128
    assert scale.numel() == (96 * 128 // 64 if kind == "nf4" else 96)
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("kind", FORMATS)
def test_shapes_are_known_without_values(kind: str) -> None:
    real = FORMATS[kind].quantise(weight((7, 96)))
    empty = FORMATS[kind].quantise(torch.empty(7, 96, device="meta"))
    assert [(t.shape, t.dtype) for t in empty] == [(t.shape, t.dtype) for t in real]
    assert all(tensor.is_meta for tensor in empty)


def test_the_levels_are_the_published_ones() -> None:
    """Compute quantiles of a normal distribution, scaled to [-1, 1], like `create_normal_map` of bitsandbytes."""
    offset = 0.9677083

    def quantile(share: float) -> float:
        return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))

    upper = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    lower = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    levels = sorted([*lower, 0.0, *upper])
    expected = [level / max(levels) for level in levels]
    assert all(math.isclose(a, b, abs_tol=2e-5) for a, b in zip(NF4_LEVELS, expected, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "config"), [("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")])
def test_values_are_those_of_torchao(kind: str, config: str, seed: int) -> None:
    """Compare bit for bit for fp32 weights; for other dtypes, torchao rounds the scale, but frostline does not."""
    quantization: Any = pytest.importorskip("torchao.quantization")
    given = weight((80, 192), seed=seed)
    layer = nn.Linear(192, 80, bias=False)
    layer.weight = nn.Parameter(given.clone(), requires_grad=False)
    quantization.quantize_(layer, getattr(quantization, config)())
    codes, scale = FORMATS[kind].quantise(given)
    theirs: Any = layer.weight
    assert torch.equal(codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(scale, theirs.scale)
    for dtype in TYPES:
        assert torch.equal(values(kind, (codes, scale), (80, 192)).to(dtype), theirs.dequantize(output_dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(80, 192), (3, 50)])
def test_values_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Compare bit for bit."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    given = weight(shape, dtype)
    packed, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, scale = FORMATS["nf4"].quantise(given)
    assert torch.equal(codes.flatten()[: packed.numel()], packed.flatten())
    assert torch.equal(scale.flatten(), state.absmax)
    assert torch.equal(values("nf4", (codes, scale), shape).to(dtype), functional.dequantize_4bit(packed, state))
