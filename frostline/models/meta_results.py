"""Cache the results of operations on meta tensors: a network calls the same few operations at the same few shapes.

PyTorch computes most result shapes in Python, which can take milliseconds for each operation.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Maximum number of cached operations. A denoiser, a VAE and a text encoder at one size use a few thousand.
_MOST = 50_000
_results: dict[Hashable, Any] = {}
_UNKNOWN, _NOT_KEPT = object(), object()


class _Made:
    """Shape, strides and dtype of a result, from which it can be created again."""

    __slots__ = ("dtype", "shape", "strides")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.strides, self.dtype = tensor.shape, tensor.stride(), tensor.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def call_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`, an operator on meta tensors; PyTorch computes each result shape only once.

    A cached result is created again as new tensors with the same shapes, strides and dtypes, each with its own storage.
    Operators that write to an argument, or return a view of one, are always called.
    """
    if not _makes_new_tensors(func):
        return func(*args, **kwargs)
    try:
        key = (func, *map(_key, args), *((name, _key(value)) for name, value in kwargs.items()))
        known = _results.get(key, _UNKNOWN)
    except TypeError:  # not hashable
        return func(*args, **kwargs)
    if known is _UNKNOWN:
        result = func(*args, **kwargs)
        if len(_results) >= _MOST:
            _results.clear()
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *kwargs.values()))}
        _results[key] = _taken_apart(result, inputs)
        return result
    return func(*args, **kwargs) if known is _NOT_KEPT else _put_together(known)


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    return not any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    # 1, 1.0 and True are equal, but lead to different result types.
    return type(value), value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _taken_apart(result: Any, inputs: set[int]) -> Any:
    """Return a result with each tensor as a `_Made`; `_NOT_KEPT` if a tensor is not new or is part of a larger one."""
    storages = set(inputs)
    for tensor in _tensors((result,)):
        storage = tensor.untyped_storage()
        again = _Made(tensor).make()
        if storage._cdata in storages or storage.nbytes() != again.untyped_storage().nbytes():
            return _NOT_KEPT
        if tensor.storage_offset() or not tensor.is_meta:
            return _NOT_KEPT
        storages.add(storage._cdata)
    return _parts(result)


def _parts(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _Made(result)
    if isinstance(result, list | tuple):
        return type(result)(map(_parts, result))
    return result


def _put_together(parts: Any) -> Any:
    if isinstance(parts, _Made):
        return parts.make()
    if isinstance(parts, list | tuple):
        return type(parts)(map(_put_together, parts))
    return parts
