"""Operations of frozen networks: differentiable with respect to their input only, with few tensors saved for backward.

PyTorch saves the input of a convolution, which is only needed for the gradient of the weights, and every intermediate
result of a normalisation. Here, a convolution saves no activations, and a normalisation saves its input and one float32
norm for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from frostline.models.precision import autocast_dtype

_aten = torch.ops.aten
# As in `F.normalize`.
_SMALLEST_LENGTH = 1e-12
_ELEMENTS_AT_ONCE = 2**24
_SLOW = torch._C._ConvBackend.Slow3d  # type: ignore[attr-defined]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """Apply `F.conv2d` or `F.conv3d`, in oneDNN on a CPU; the weights get no gradient.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W).
        stride, padding, dilation: one value for each of the two or three dimensions.
    """
    if dtype := autocast_dtype(x.device.type):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Convolution.apply(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options = options
        result = convolve(x, weight, bias, *options)
        ctx.shape, ctx.layout = x.shape, _layout(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        gradient = gradients[0].contiguous(memory_format=ctx.layout)
        # Not read: it only provides size and layout of the result.
        x = empty_as(ctx.shape, gradient)
        none = [0] * len(stride)
        around = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
        if groups == max(stride) == 1 and min(around) >= 0 and _is_slow(x, weight, stride, padding, dilation):
            # The gradient is a convolution with the mirrored kernel, which `convolve` runs fast.
            mirrored = weight.flip(2, 3, 4).transpose(0, 1).contiguous()
            return (convolve(gradient, mirrored, None, stride, around, dilation, groups), *6 * [None])
        gradient, _, _ = _aten.convolution_backward(
            *(gradient, x, weight, None, stride, padding, dilation, False, none, groups, [True, False, False])
        )
        return (gradient, *6 * [None])


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Convolve over two or three dimensions (see `convolution`); on a CPU, fp32 in three dimensions uses oneDNN.

    At batch size 1, torch uses its own slow path for fp32: about five times slower, with results equal within 1e-6.
    """
    if weight.ndim == 4:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    # autocast only applies to the public operator, and a tracer must see that one as well.
    traced = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    if not _in_onednn(x, weight) or torch.is_autocast_enabled("cpu") or traced:
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)


def _in_onednn(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def _is_slow(x: Tensor, weight: Tensor, *options: tuple[int, ...]) -> bool:
    """Return whether torch's own gradient uses the slow path that `convolve` avoids."""
    if weight.ndim == 4 or not _in_onednn(x, weight) or isinstance(x, FakeTensor):
        return False
    none = [0] * len(options[0])
    return torch._C._select_conv_backend(x, weight, None, *options, False, none, 1, None) == _SLOW


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Apply `F.prelu` with a slope that broadcasts to `x` and gets no gradient."""
    return _PReLU.apply(x, slope)  # type: ignore[no-any-return]


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch._prelu_kernel(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, slope = ctx.saved_tensors
        # `torch.where` does not vectorise.
        positive = _aten.threshold_backward(gradients[0], x, 0)
        return positive.lerp_(gradients[0], slope), None


def rms_norm_silu(x: Tensor, gamma: Tensor, front: int | Tensor = 0) -> Tensor:
    """Compute `F.silu(F.normalize(x, dim=1) * sqrt(C) * gamma)`, with preceding frames.

    Args:
        x: (B, C, T, H, W).
        gamma: (C, 1, 1, 1).
        front: frames before the first one, for a causal convolution: a number of zero frames, or (B, C, front, H, W),
            which are not normalised.
    Returns:
        (B, C, front + T, H, W).
    """
    frames, before = (front, None) if isinstance(front, int) else (front.shape[2], front)
    return _RMSNormSiLU.apply(x, gamma, frames, before)  # type: ignore[no-any-return]


class _RMSNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, front: int, before: Tensor | None) -> Tensor:
        batch, channels, frames, height, width = x.shape
        padded = empty_as((batch, channels, front + frames, height, width), x)
        padded[:, :, :front] = 0 if before is None else before
        lengths = []
        runs = _runs(x)
        for run, place in zip(runs, padded[:, :, front:].split(runs[0].shape[2], dim=2), strict=True):
            lengths.append(_length(run))
            scaled = (run * _inverse(lengths[-1], channels)).mul_(gamma)
            if scaled.dtype == place.dtype:
                _aten.silu.out(scaled, out=place)
            else:
                place.copy_(F.silu(scaled, inplace=True))
        ctx.save_for_backward(x, gamma, _joined(lengths))
        ctx.front = front
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gamma, lengths = ctx.saved_tensors
        parts = []
        runs = _runs(x)
        frames = runs[0].shape[2]
        following = gradients[0][:, :, ctx.front :]
        for run, gradient, length in zip(runs, following.split(frames, 2), lengths.split(frames, 2), strict=True):
            inverse = _inverse(length, x.shape[1])
            scaled = (run * inverse).mul_(gamma)
            along = _aten.silu_backward(gradient.to(scaled.dtype), scaled).mul_(gamma)
            del scaled
            # The output does not depend on the length of a pixel's vector: its gradient is orthogonal to the vector.
            share = (along * run).sum(1, keepdim=True) / length.square()
            share = torch.where(length > _SMALLEST_LENGTH, share * inverse, 0)
            parts.append(along.mul_(inverse).addcmul_(run, share, value=-1).to(x.dtype))
        before = gradients[0][:, :, : ctx.front] if ctx.needs_input_grad[3] else None
        return _joined(parts), None, None, before


def _runs(x: Tensor) -> tuple[Tensor, ...]:
    """Split (B, C, T, H, W) into groups of frames, which limits the memory of intermediate results."""
    return x.split(max(1, _ELEMENTS_AT_ONCE * x.shape[2] // x.numel()), dim=2)


def _joined(runs: list[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)


def _length(x: Tensor) -> Tensor:
    """Return (B, 1, T, H, W) float32 norms over the channels."""
    if x.device.type == "cpu":
        # `vector_norm` does not vectorise across the channels.
        x = x.float()
        return (x * x).sum(1, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)


def _inverse(length: Tensor, channels: int) -> Tensor:
    return channels**0.5 / length.clamp(min=_SMALLEST_LENGTH)


def empty_as(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of another shape, channels last if `like` is."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return channels_last if x.is_contiguous(memory_format=channels_last) else torch.contiguous_format
