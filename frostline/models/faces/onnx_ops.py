"""ONNX operations as torch functions: positional arguments are the node's inputs, keywords its attributes.

Signatures follow the ONNX operator specification (https://onnx.ai/onnx/operators), opsets 7 to 21; an attribute that
is not in a signature is not supported. 64-bit integer inputs (shapes, axes) come as python lists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Argument = Tensor | list[int] | int | None
"""What a node reads: a value, a list of integers or one (shapes, axes), or nothing for an omitted input."""


def constant(*, value: Tensor) -> Tensor:
    return value


def identity(x: Tensor) -> Tensor:
    return x


def dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    ratio_attribute: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Frozen networks do not drop."""
    return x


def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """`(x - zero_point) * scale` with scales per tensor, per slice of `axis`, or per block of it."""

    def spread(parameter: Tensor) -> Tensor:
        if block_size:
            return parameter.repeat_interleave(block_size, dim=axis).narrow(axis, 0, x.shape[axis])
        if parameter.ndim == 1 and parameter.numel() > 1:
            shape = [1] * x.ndim
            shape[axis] = -1
            return parameter.reshape(shape)
        return parameter

    centred = x.float() if zero_point is None else x.float() - spread(zero_point).float()
    return centred * spread(scale)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    _refuse_auto_pad(auto_pad)
    x, padding = _split_padding(x, pads, 0.0)
    return F.conv2d(x, weight, bias, tuple(strides or (1, 1)), padding, tuple(dilations or (1, 1)), group)


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    per_channel = slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0]
    if slope.numel() == 1 or per_channel:
        return F.prelu(x, slope.flatten())
    return torch.where(x < 0, slope * x, x)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = (a.mT if transA else a) @ (b.mT if transB else b)
    if alpha != 1.0:
        product = alpha * product
    if c is None:
        return product
    return product + (c if beta == 1.0 else beta * c)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.flatten(axis) if axis == 1 else x.reshape(x.shape[:axis].numel(), -1)


def reshape(x: Tensor, shape: list[int], *, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape)])


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    _refuse_auto_pad(auto_pad)
    x, padding = _split_padding(x, pads, -torch.inf)
    return F.max_pool2d(
        x,
        tuple(kernel_shape),
        tuple(strides or (1, 1)),
        padding,
        tuple(dilations or (1, 1)),
        ceil_mode=bool(ceil_mode),
    )


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    _refuse_auto_pad(auto_pad)
    x, padding = _split_padding(x, pads, 0.0)
    return F.avg_pool2d(
        x,
        tuple(kernel_shape),
        tuple(strides or (1, 1)),
        padding,
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
    )


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


def reduce_mean(
    x: Tensor, axes_input: list[int] | None = None, *, axes: Sequence[int] | None = None, keepdims: int = 1
) -> Tensor:
    chosen = axes if axes_input is None else axes_input
    return x.mean(dim=None if chosen is None else tuple(chosen), keepdim=bool(keepdims))


def clip(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    """Limits are inputs since opset 11 and were attributes before."""
    lower, upper = (min if low is None else low), (max if high is None else high)
    if lower is not None:
        x = torch.clamp(x, min=lower)
    return x if upper is None else torch.clamp(x, max=upper)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.softmax(x, dim=axis)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(perm) if perm is not None else tuple(range(x.ndim))[::-1])


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, dim=axis)


def squeeze(x: Tensor, axes_input: list[int] | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    chosen = axes if axes_input is None else axes_input
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def unsqueeze(x: Tensor, axes_input: list[int] | None = None, *, axes: Sequence[int] = ()) -> Tensor:
    chosen = axes if axes_input is None else axes_input
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Clip": clip,
    "Concat": concat,
    "Constant": constant,
    "Conv": conv,
    "DequantizeLinear": dequantize_linear,
    "Div": lambda a, b: a / b,
    "Dropout": dropout,
    "Flatten": flatten,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "Identity": identity,
    "LeakyRelu": leaky_relu,
    "MatMul": lambda a, b: a @ b,
    "MaxPool": max_pool,
    "Mul": lambda a, b: a * b,
    "PRelu": prelu,
    "ReduceMean": reduce_mean,
    "Relu": lambda x: F.relu(x),
    "Reshape": reshape,
    "Sigmoid": lambda x: torch.sigmoid(x),
    "Softmax": softmax,
    "Squeeze": squeeze,
    "Sub": lambda a, b: a - b,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
"""ONNX operation to torch function."""


def _refuse_auto_pad(auto_pad: str) -> None:
    if auto_pad not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad={auto_pad} is not supported")


def _split_padding(x: Tensor, pads: Sequence[int] | None, value: float) -> tuple[Tensor, tuple[int, int]]:
    """ONNX padding [top, left, bottom, right]: torch's own where it is symmetric, else applied to `x` beforehand."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)
