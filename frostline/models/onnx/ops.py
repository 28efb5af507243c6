"""ONNX operations as torch functions: positional arguments are the node's inputs, keyword arguments its attributes.

Signatures follow the ONNX operator specification (https://onnx.ai/onnx/operators), opsets 7 to 21; attributes that are
not in a signature are not supported. In several operations, an attribute became an input in some opset: one parameter
accepts both.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.models import frozen_ops as frozen

Argument = Tensor | list[int] | list[float] | int | None
"""An input of a node: a value, Python numbers (shapes, axes, factors), or None for an omitted input."""

Integers = Tensor | Sequence[int]
"""A shape or axes: a tensor while constants are folded, Python integers at run time.

Values that a graph computes from the shape of its input also stay Python integers, so that a tracer sees dynamic
dimensions.
"""


def constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    if value is not None:
        return value
    number = next(v for v in (value_float, value_floats, value_int, value_ints) if v is not None)
    return torch.tensor(number)


def identity(x: Tensor) -> Tensor:
    return x


def dropout(x: Tensor, ratio: Tensor | float = 0.5, training_mode: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """Return the input: frozen networks do not use dropout."""
    return x


def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """Compute `(x - zero_point) * scale` with scales per tensor, per slice of `axis`, or per block of it."""

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
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    x, padding = _split_padding(x, pads, 0.0)
    options = (tuple(strides or (1, 1)), padding, tuple(dilations or (1, 1)), group)
    return (frozen.convolution if _live(x) else frozen.convolve)(x, weight, bias, *options)


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """Normalise with the running statistics, as in inference."""
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    if _live(x):
        return frozen.prelu(x, slope)
    if slope.numel() == 1 or (slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0]):
        return F.prelu(x, slope.flatten())
    return torch.lerp(F.relu(x), x, slope)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    product = (a.mT if transA else a) @ (b.mT if transB else b)
    if alpha != 1.0:
        product = alpha * product
    if c is None:
        return product
    return product + (c if beta == 1.0 else beta * c)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.flatten(axis) if axis == 1 else x.reshape(x.shape[:axis].numel(), -1)


def reshape(x: Tensor, shape: Integers, *, allowzero: int = 0) -> Tensor:
    sizes = enumerate(_integers(shape))
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in sizes])


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
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
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
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


def reduce_mean(x: Tensor, axes: Integers | None = None, *, keepdims: int = 1) -> Tensor:
    return x.mean(dim=None if axes is None else _integers(axes), keepdim=bool(keepdims))


def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    if min is not None:
        x = torch.clamp(x, min=min)
    return x if max is None else torch.clamp(x, max=max)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.softmax(x, dim=axis)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(perm) if perm is not None else tuple(range(x.ndim))[::-1])


def concat(*parts: Tensor | list[int], axis: int) -> Tensor | list[int]:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) < len(parts):
        return [number for part in parts for number in _integers(part)]
    return torch.cat(tensors, dim=axis)


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> list[int]:
    return list(x.shape[start:end])


def gather(x: Tensor | list[int], indices: Tensor | list[int] | int, *, axis: int = 0) -> Tensor | list[int] | int:
    if isinstance(x, Tensor):
        index = torch.as_tensor(indices, device=x.device)
        gathered = x.index_select(axis, index.reshape(-1) % x.shape[axis])
        return gathered.reshape((*x.shape[:axis], *index.shape, *x.shape[axis:][1:]))
    chosen = indices.tolist() if isinstance(indices, Tensor) else indices
    return x[chosen] if isinstance(chosen, int) else [x[index] for index in chosen]


def slice_(
    x: Tensor | list[int], starts: Integers, ends: Integers, axes: Integers | None = None, steps: Integers | None = None
) -> Tensor | list[int]:
    bounds = list(zip(_integers(starts), _integers(ends), strict=True))
    along = range(len(bounds)) if axes is None else _integers(axes)
    if any(step != 1 for step in _integers(steps or [])):
        raise ValueError("slices with steps are not supported")
    for axis, (start, end) in zip(along, bounds, strict=True):
        if not isinstance(x, Tensor):
            return x[start:end]
        x = x[(*[slice(None)] * (axis % x.ndim), slice(start, end))]
    return x


# Element types of the ONNX specification: FLOAT, FLOAT16, DOUBLE and BFLOAT16; BOOL.
_FLOAT_TYPES, _BOOL = (1, 10, 11, 16), 9


def cast(x: Tensor | list[int] | int, *, to: int, saturate: int = 1) -> Tensor | list[int] | int:
    """Convert a tensor to float, integer (truncating) or bool; floats keep their precision, Python integers stay."""
    if not isinstance(x, Tensor):
        return x
    if to in _FLOAT_TYPES:
        return x if x.is_floating_point() else x.float()
    return x != 0 if to == _BOOL else x.long()


def div(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """Compute `a / b`, truncated towards zero if both are integers."""
    if _is_float(a) or _is_float(b):
        return a / b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")
    return a // b  # Python integers are sizes, never negative.


def _is_float(x: Tensor | float) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float)


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Sequence[float] | None = None,
    sizes: Integers | None = None,
    *,
    mode: bytes = b"nearest",
    coordinate_transformation_mode: bytes = b"half_pixel",
    nearest_mode: bytes = b"round_prefer_floor",
    cubic_coeff_a: float = -0.75,
) -> Tensor:
    """Resize with PyTorch's nearest-neighbour interpolation, by integer factors or to given sizes.

    Raises:
        ValueError: other modes or factors are requested.
    """
    if (mode, coordinate_transformation_mode, nearest_mode) != (b"nearest", b"asymmetric", b"floor"):
        given = b", ".join((mode, coordinate_transformation_mode, nearest_mode)).decode()
        raise ValueError(f"resize is only supported as nearest, asymmetric, floor, not {given}")
    if sizes is not None:
        return F.interpolate(x, size=tuple(_integers(sizes)[2:]), mode="nearest")
    factors = [int(factor) for factor in scales or ()]
    if len(factors) != 4 or factors != list(scales or ()):
        raise ValueError(f"resize is only supported by integer factors, not {scales}")
    return F.interpolate(x, size=(x.shape[2] * factors[2], x.shape[3] * factors[3]), mode="nearest")


def squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_integers(axes))


def unsqueeze(x: Tensor | int, axes: Integers) -> Tensor | list[int]:
    if not isinstance(x, Tensor):
        return [x]
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in _integers(axes)):
        x = x.unsqueeze(axis)
    return x


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Constant": constant,
    "Conv": conv,
    "DequantizeLinear": dequantize_linear,
    "Div": div,
    "Dropout": dropout,
    "Flatten": flatten,
    "Gemm": gemm,
    "Gather": gather,
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
    "Resize": resize,
    "Shape": shape,
    "Sigmoid": lambda x: torch.sigmoid(x),
    "Slice": slice_,
    "Softmax": softmax,
    "Squeeze": squeeze,
    "Sub": lambda a, b: a - b,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
"""Maps ONNX operations to torch functions."""


def _live(x: Tensor) -> bool:
    """Return whether a gradient flows through `x`; the weights are frozen."""
    return x.requires_grad and torch.is_grad_enabled()


def _integers(values: Integers) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _split_padding(x: Tensor, pads: Sequence[int] | None, value: float) -> tuple[Tensor, tuple[int, int]]:
    """Return torch's padding for ONNX padding [top, left, bottom, right] if it is symmetric; otherwise pad `x`."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)
