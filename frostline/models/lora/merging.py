"""Merge adapters into the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from frostline.atomic_io import check_writable
from frostline.errors import ConfigError

from .adapter import Adapter, is_finite
from .writing import write_tensors


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a denoiser with weights of these shapes, by name in Wan's format, has all layers of the adapter.

    Raises:
        ConfigError: a layer or a parameter is missing, or has another shape.
    """
    for name, wanted in _changed(adapter).items():
        _check_shape(adapter, name, shapes.get(name), wanted)


def merge_adapter(
    tensors: Mapping[str, Tensor], adapter: Adapter, lora_scale: float = 1.0, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the weights of a denoiser with the adapter merged, `W + lora_scale * (alpha / rank * B A + difference)`.

    Computed in fp32, one weight at a time, and rounded once.

    Args:
        tensors: by name in Wan's format, with the dtypes in their files, so that nothing is rounded twice.
        dtype: dtype of all returned weights; each keeps its dtype if not given.
    Raises:
        ConfigError: the adapter is for another model, or a merged weight is not finite.
    """
    changed = _changed(adapter)
    for name in sorted(changed.keys() - tensors.keys()):
        _check_shape(adapter, name, None, changed[name])
    merged: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if name in changed:
            _check_shape(adapter, name, tuple(weight.shape), changed[name])
        merged[name] = merged_weight(adapter, name, weight, lora_scale, dtype or weight.dtype)
    return merged


def merged_weight(adapter: Adapter, name: str, weight: Tensor, lora_scale: float, dtype: torch.dtype) -> Tensor:
    """Return a weight with a matching adapter merged, computed in fp32 and rounded once; see `merge_adapter`.

    Args:
        name: in Wan's format; may be a weight that the adapter does not change.
        lora_scale: factor of the adapter's update.
        dtype: dtype of the result.
    Raises:
        ConfigError: the result is not finite.
    """
    if name in adapter.differences or name.removesuffix(".weight") in adapter.layers:
        weight = weight.float() + lora_scale * _update(adapter, name)
    merged = weight.to(dtype)
    if not is_finite(merged):
        raise ConfigError(_not_finite(name, weight, dtype))
    return merged


def check_weights_file(out: Path) -> None:
    """Check, before weights are merged, that they can be written to `out`.

    Raises:
        ConfigError: it is not a .safetensors file.
        DataError: it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: weights must be written to a .safetensors file")
    check_writable(out)


def write_weights(tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write tensors to one safetensors file atomically.

    Raises:
        ConfigError: it is not a .safetensors file.
        DataError: it cannot be written.
    """
    check_weights_file(out)
    write_tensors(tensors, out)


def _changed(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that the adapter changes."""
    weights = {f"{layer}.weight": pair.weight_shape for layer, pair in adapter.layers.items()}
    return weights | {name: tuple(difference.shape) for name, difference in adapter.differences.items()}


def _check_shape(adapter: Adapter, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> None:
    if found != wanted:
        what = "missing" if found is None else f"of shape {found}"
        raise ConfigError(f"{adapter.path} does not match the model: {name} is {what}, the adapter requires {wanted}")


def _update(adapter: Adapter, name: str) -> Tensor:
    """Return the values that the adapter adds to a parameter, in fp32."""
    difference = adapter.differences.get(name)
    return adapter.layers[name.removesuffix(".weight")].delta() if difference is None else difference.float()


def _not_finite(name: str, weight: Tensor, dtype: torch.dtype) -> str:
    if is_finite(weight):
        return (
            f"{name} has merged values too large for {dtype}: merge the adapter into the model with "
            "`frostline adapter merge --precision bf16` (or fp32)"
        )
    return f"{name} has NaN or infinite values after the merge: the model is damaged, or the LoRA scale is too large"
