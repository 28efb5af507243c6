"""Run networks on the meta device: tensors have shapes, dtypes and storage sizes, but no data."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.deferred_init import deferred_init
from frostline.models.meta_results import call_on_meta

_META = torch.device("meta")
_aten = torch.ops.aten
# Operations that modify their first argument and return it.
_IN_PLACE = frozenset(
    {
        _aten.add_.Tensor,
        _aten.addcmul_.default,
        _aten.copy_.default,
        _aten.div_.Tensor,
        _aten.mul_.Tensor,
        _aten.silu_.default,
        _aten.sqrt_.default,
    }
)
_RANDOM = frozenset({Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_})


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Move parameters to the meta device when modules register them within the block; buffers are unchanged."""
    with deferred_init("diffsynth"):
        from diffsynth.core.vram.initialization import skip_model_initialization

    with skip_model_initialization(), _NoRandomNumbers():
        yield


@contextmanager
def on_meta(*modules: nn.Module) -> Iterator[None]:
    """Run every operation within the block on the meta device, whatever the device of its tensors.

    A step of any size can then be run to obtain its shapes and memory, without allocating or computing anything.
    torch's `FakeTensorMode`, which also keeps track of each tensor's device, takes twice as long.

    Args:
        modules: their parameters and buffers are on the meta device within the block, and restored afterwards.
    """
    before = [(part, dict(part._parameters), dict(part._buffers)) for module in modules for part in module.modules()]
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            # If a function of torch.compile is first called within a dispatch mode, it is not compiled later, either.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Anomaly detection inspects values, which do not exist here.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        try:
            for part, parameters, buffers in before:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        empty = torch.empty_like(parameter, device=_META, memory_format=torch.contiguous_format)
                        part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                for name, buffer in buffers.items():
                    if buffer is not None:
                        part._buffers[name] = torch.empty_like(buffer, device=_META)
            with _fused_attention(), _OnMeta():
                yield
        finally:
            for part, parameters, buffers in before:
                part._parameters.update(parameters)
                part._buffers.update(buffers)


class _OnMeta(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # By `id` of the tensor, which is stored as well: otherwise its id could be reused.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args = [self._moved(value) for value in args]
        kwargs = {name: self._moved(value) for name, value in kwargs.items()} if kwargs else {}
        if func in _IN_PLACE:
            return args[0]
        if _takes_device(func):
            kwargs["device"] = _META
        return call_on_meta(func, args, kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) not in self._copies:
                strided = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
                self._copies[id(value)] = (value, strided)
            return self._copies[id(value)][1]
        if isinstance(value, list | tuple):
            return type(value)(self._moved(part) for part in value)
        return value


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Run attention of meta tensors as one kernel within the block, as on real devices, without a tensor of all scores.

    A `TorchFunctionMode` would miss the recomputation by gradient checkpointing in backward.
    """
    unfused = F.scaled_dot_product_attention
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    @functools.wraps(unfused)
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ):
        if not query.is_meta or query.ndim != 4:
            return unfused(query, key, value, attn_mask, *args, **kwargs)
        return kernel(query, key, value, attn_mask=attn_mask)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = unfused


class _NoRandomNumbers(TorchFunctionMode):
    """Skip random initialisation of meta tensors: `normal_` would import torch's compiler, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return func(*args, **kwargs)
