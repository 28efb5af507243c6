"""Operations of frozen networks compared with PyTorch's own: values, and the gradient of the input."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.models import frozen_ops as frozen
from frostline.models.frozen_ops import convolution, prelu, rms_norm_silu
from frostline.train.memory.tracker import MemoryTracker

LAYOUTS = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(fast: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare values and input gradients, in each memory layout, for a random gradient of the output."""
    for layout in LAYOUTS[x.ndim]:
        values, gradients = [], []
        for operation in (fast, plain):
            leaf = x.contiguous(memory_format=layout).detach().requires_grad_()
            result = operation(leaf)
            result.backward(random(*result.shape, seed=1).to(result.dtype))
            assert leaf.grad is not None
            values.append(result.detach())
            gradients.append(leaf.grad)
        assert values[0].dtype == values[1].dtype
        for actual, expected in (values, gradients):
            assert expected.abs().max() > 0
            torch.testing.assert_close(actual, expected, atol=2e-6 * expected.abs().max().item(), rtol=1e-5)
            assert (actual - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "groups"),
    [
        ((6, 5, 8, 10), (4, 6, 3, 3, 3), (1, 1, 1), (0, 1, 1), 1),
        ((6, 5, 8, 10), (4, 6, 1, 1, 1), (1, 1, 1), (0, 0, 0), 1),
        ((6, 5, 8, 10), (4, 6, 3, 1, 1), (1, 1, 1), (1, 1, 0), 1),
        ((6, 5, 8, 10), (4, 6, 3, 3, 3), (1, 2, 2), (0, 1, 1), 1),
        ((6, 9, 10), (8, 6, 3, 3), (2, 2), (1, 1), 1),
        ((6, 9, 10), (6, 1, 3, 3), (1, 1), (1, 1), 6),
    ],
)
def test_convolution(
    batch: int,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> None:
    weight, bias = random(*kernel, seed=2), random(kernel[0], seed=3)
    options = (stride, padding, tuple(1 for _ in stride), groups)
    plain: Callable[..., Tensor] = F.conv2d if len(shape) == 3 else F.conv3d
    assert_same(
        lambda x: convolution(x, weight, bias, *options),
        lambda x: plain(x, weight, bias, *options),
        random(batch, *shape),
    )


def test_convolution_under_autocast() -> None:
    weight, x = random(4, 6, 3, 3), random(1, 6, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = convolution(x, weight, None, (1, 1), (1, 1), (1, 1)), F.conv2d(x, weight, None, 1, 1)
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(fast, plain)
    gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (fast, plain)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("slope", [random(6, 1, 1), torch.tensor(0.3), random(6, 8, 8)])
def test_prelu(slope: Tensor) -> None:
    """Also test negative slopes; at 0, the gradient is the slope."""
    x = random(3, 6, 8, 8)
    x[:, :, 0] = 0

    def plain(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, slope * x)

    assert_same(lambda x: prelu(x, slope), plain, x)


@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("at_once", [2**24, 500])
def test_rms_norm_silu(front: int, scale: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalise all frames at once, and two or one at a time."""
    monkeypatch.setattr(frozen, "_ELEMENTS_AT_ONCE", at_once)
    gamma = random(6, 1, 1, 1, seed=2)

    def plain(x: Tensor) -> Tensor:
        return F.pad(F.silu(F.normalize(x, dim=1) * 6**0.5 * gamma), (0, 0, 0, 0, front, 0))

    assert_same(lambda x: rms_norm_silu(x, gamma, front), plain, scale * random(2, 6, 3, 4, 5))


def test_rms_norm_silu_behind_other_frames() -> None:
    """Do not normalise the frames before, and give them their own gradient."""
    gamma, before = random(6, 1, 1, 1, seed=2), random(2, 6, 2, 4, 5, seed=3).requires_grad_()
    x, weights = random(2, 6, 3, 4, 5).requires_grad_(), random(2, 6, 5, 4, 5, seed=4)
    values, gradients = [], []
    for y in (
        rms_norm_silu(x, gamma, before),
        torch.cat([before, F.silu(F.normalize(x, dim=1) * 6**0.5 * gamma)], dim=2),
    ):
        values.append(y.detach())
        gradients.append(torch.autograd.grad((y * weights).sum(), (before, x)))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_pixel_without_content_is_normalised_to_zero() -> None:
    x = random(1, 6, 1, 2, 2)
    x[:, :, :, 0] = 0
    x.requires_grad_()
    y = rms_norm_silu(x, torch.ones(6, 1, 1, 1))
    y.sum().backward()
    assert x.grad is not None
    assert y[:, :, :, 0].abs().max() == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_silu_rounds_once_in_half_precision(dtype: torch.dtype) -> None:
    gamma, x = random(6, 1, 1, 1, seed=2).to(dtype), random(2, 6, 3, 4, 5).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.silu(F.normalize(exact, dim=1) * 6**0.5 * gamma.double())
    actual = rms_norm_silu(x, gamma)
    assert actual.dtype == dtype
    for y in (actual, expected):
        y.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    close = {"atol": 2 * torch.finfo(dtype).eps, "rtol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(actual.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), exact.grad, **close)


def test_what_is_kept_for_backward() -> None:
    """Keep one tensor of the input's size for a normalisation and a convolution; PyTorch's own operations keep six."""
    weight, gamma = random(8, 8, 3, 3, 3), random(8, 1, 1, 1)
    x = random(1, 8, 8, 16, 16).requires_grad_()
    with MemoryTracker([x, weight, gamma]) as tracker:
        # The input is an intermediate result, like the output of a layer before.
        made = x * 2
        y = convolution(rms_norm_silu(made, gamma, 2), weight, None, (1, 1, 1), (0, 1, 1), (1, 1, 1))
        kept = tracker.live - y.nbytes
    assert kept < 1.3 * made.nbytes
