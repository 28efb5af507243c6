"""Describe a network as text: everything that affects its outputs except its code and the values of its weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostline.runtime.identity.tensor_bytes import tensor_bytes

# Attributes that every module has, and those that depend on how it was called or compiled.
_BOOKKEEPING = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
# Attributes that PEFT adds to a model besides its layers.
_OF_ADAPTERS = frozenset({"peft_config"})
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, type(None), type(...))


def describe(module: nn.Module, live_lora: bool = False) -> str:
    """Return a description that is equal, in any process, for modules that compute the same with the same weights.

    It contains the class, `extra_repr` and own attributes of every module. Attributes are included if they are
    constants, tensors, functions, classes, arrays, or dataclasses or containers of these. For other objects, such as
    paths, only the class is included; devices are left out. A class can name attributes that do not affect the outputs
    in a set `RUN_SETTINGS`.

    Args:
        live_lora: whether LoRA layers get their matrices and scale as inputs; otherwise these are part of the module.
    """
    return _Description(live_lora).of(module, "")


def adapter_parameters(module: nn.Module) -> set[int]:
    """Return the identities (`id`) of the matrices A and B of all LoRA layers."""
    layers: list[Any] = [part for part in module.modules() if _is_lora_layer(part)]
    return {id(p) for layer in layers for matrices in (layer.lora_A, layer.lora_B) for p in matrices.parameters()}


def _is_lora_layer(module: nn.Module) -> bool:
    # A model with LoRA layers has already imported PEFT; without them, PEFT need not be imported.
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.LoraLayer)


class _Description:
    """Describe each module once, and refer to it afterwards."""

    def __init__(self, live_lora: bool) -> None:
        self._live_lora = live_lora
        self._paths: dict[int, str] = {}

    def of(self, module: nn.Module, path: str) -> str:
        """Return one line for each module."""
        return "\n".join(self._lines(module, path))

    def _lines(self, module: nn.Module, path: str) -> Iterator[str]:
        if id(module) in self._paths:
            yield f"{path} is {self._paths[id(module)]}"
            return
        self._paths[id(module)] = path
        if self._live_lora and _is_lora_layer(module):
            layer: Any = module
            variants = sorted(_qualified(type(variant)) for variant in layer.lora_variant.values())
            yield f"{path}: {_qualified(type(layer))} {variants}"
            yield from self._lines(layer.base_layer, f"{path}.base_layer")
            return
        yield f"{path}: {_qualified(type(module))}({module.extra_repr()}) {self._attributes(module, path)}"
        for name, child in module._modules.items():
            if child is not None:
                yield from self._lines(child, f"{path}.{name}")

    def _attributes(self, module: nn.Module, path: str) -> str:
        left_out = _BOOKKEEPING | getattr(type(module), "RUN_SETTINGS", frozenset())
        left_out |= _OF_ADAPTERS if self._live_lora else frozenset()
        names = sorted(vars(module).keys() - left_out)
        texts = {name: self._text(vars(module)[name], f"{path}.{name}") for name in names}
        return " ".join(f"{name}={text}" for name, text in texts.items() if text)

    def _text(self, value: object, path: str) -> str:
        """Return a description of a value that is the same in every process; empty for values that are ignored."""
        match value:
            case Enum():
                return f"{_qualified(type(value))}.{value.name}"
            case _ if isinstance(value, _CONSTANTS):
                return repr(value)
            case torch.device():
                return ""
            case Tensor():
                return f"tensor({value.dtype}, {tuple(value.shape)}, {_digest(value)})"
            case np.ndarray() | np.generic():
                return f"array({value.dtype}, {value.shape}, {hashlib.sha256(value.tobytes()).hexdigest()})"
            case nn.Module():  # modules that are not registered as submodules, for example in a list
                tensors = dict(itertools.chain(value.named_parameters(), value.named_buffers()))
                return f"({self.of(value, path)}; {self._text(tensors, path)})"
            case Mapping():
                items = (f"{self._text(name, path)}: {self._text(item, path)}" for name, item in value.items())
                return f"{{{', '.join(sorted(items))}}}"
            case Set():
                return f"{{{', '.join(sorted(self._text(item, path) for item in value))}}}"
            case Sequence():
                return f"[{', '.join(self._text(item, path) for item in value)}]"
            case functools.partial():
                return f"partial({self._text([value.func, value.args, value.keywords], path)})"
            case type():
                return _qualified(value)
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return f"{_qualified(type(value))}({self._text(fields, path)})"
        if callable(value) and hasattr(value, "__qualname__"):
            return _qualified(value)
        return f"<{_qualified(type(value))}>"


def _qualified(code: Any) -> str:
    return f"{code.__module__}.{code.__qualname__}"


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "no values"
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
