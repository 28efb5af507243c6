"""8-bit weights with scales, and quantised formats that are not supported.

Two programs write such weights: ComfyUI (`scaled_fp8` in the file and a `scale_weight` for each layer; since 2025 a
`weight_scale`, with the format of the layer in `comfy_quant` or in the header) and musubi-tuner (`scale_weight`: one
for the layer, for each row, or for blocks of a row). The value of a weight is always `weight * scale`. Scales of
activations are for engines that multiply in 8 bits; they are ignored.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError

from .tensor_files import LAYER_FORMAT, Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FP8 = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (".scale_weight", ".weight_scale")
_MARKER, _HEADER_FORMATS = "scaled_fp8", "_quantization_metadata"
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
# Tensor names that identify unsupported quantisation formats.
_REFUSED = (
    (re.compile(r".*\.quant_state\.bitsandbytes__nf4"), "NF4 (bitsandbytes)"),
    (re.compile(r".*\.quant_state\.bitsandbytes__fp4"), "FP4 (bitsandbytes)"),
    (re.compile(r".*\.SCB"), "INT8 (bitsandbytes)"),
    (re.compile(r".*\.(wscales|smooth_factor)"), "SVDQuant (Nunchaku)"),
    (re.compile(r".*\.(qweight|qzeros)"), "GPTQ or AWQ"),
    (re.compile(r".*\.weight\._(data|scale)"), "Quanto"),
    (re.compile(r".*\.weight_scale_2"), "NVFP4"),
    (re.compile(r".*\.weight_scale_inv"), "FP8 with a scale for each square block (weight_scale_inv)"),
)
# Types (or prefixes of their names) of packed or quantised weights, which are not supported, except those in `FP8`.
_PACKED = ("uint8", "int8", "F4", "F6_", "F8_", "float4", "float8")


@dataclass(frozen=True)
class StoredWeights:
    """The weights in files, by their names there, without scales and other tensors.

    Attributes:
        scales: the name of the scale of each weight that has one.
    """

    infos: Mapping[str, TensorInfo]
    scales: Mapping[str, str]

    @property
    def compute_type(self) -> str | None:
        """Return the compute dtype of a model with 8-bit weights: the dtype of most other weights."""
        if not any(info.dtype in FP8 for info in self.infos.values()):
            return None
        elements = {"bfloat16": 0, "float16": 0, "float32": 0}
        for info in self.infos.values():
            if info.dtype in elements:
                elements[info.dtype] += math.prod(info.shape)
        return max(elements, key=elements.__getitem__)


def find_weights(header: Header, path: Path) -> StoredWeights:
    """Separate weights from the tensors that are needed to dequantise them.

    Args:
        header: of all files of a network.
        path: for messages.
    Raises:
        ConfigError: the weights are quantised in an unsupported format, which the message names, or a scale does not
            match its weight.
    """
    infos = header.tensors
    _refuse_by_name(infos, path)
    _refuse_by_format(header, path)
    beside = (*_OF_ACTIVATIONS, *_SCALES, LAYER_FORMAT)
    weights = {
        name: info for name, info in infos.items() if not name.endswith(beside) and name.rpartition(".")[2] != _MARKER
    }
    for name, info in weights.items():
        if info.dtype.startswith(_PACKED) and info.dtype not in FP8:
            raise _refusal(path, f"{info.dtype} ({name})")
    scales = _scales(infos, weights, path)
    bare = [name for name, info in weights.items() if info.dtype in FP8 and name not in scales]
    if scales and bare:
        log.warning(
            "%s: %d 8-bit weights have no scale, although others have one: they are not scaled; the first is %s",
            path,
            len(bare),
            bare[0],
        )
    return StoredWeights(weights, scales)


def dequantise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the values of an 8-bit weight in fp32.

    Args:
        scale: one element, one for each row, or (rows, blocks, 1); None for a weight without a scale.
    """
    values = weight.float()
    if scale is None:
        return values
    scale = scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim == 3:
        return (values.reshape(scale.shape[0], scale.shape[1], -1) * scale).reshape(weight.shape)
    return values * scale.reshape(-1, *(1 for _ in weight.shape[1:]))


def as_rows(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return an 8-bit weight as (out, in) bytes and (out, 1) fp32 scales, the fp8 format of `models.quantization`.

    The values are those of `dequantise`.

    Args:
        scale: see `dequantise`.
    Returns:
        None if this format cannot represent it: it is float8_e5m2, not a matrix, or has scales of blocks.
    """
    import torch

    if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2 or (scale is not None and scale.ndim == 3):
        return None
    rows = weight.shape[0]
    of_rows = torch.ones(1, device=weight.device) if scale is None else scale.float().reshape(-1)
    return weight.view(torch.uint8), of_rows.expand(rows).reshape(rows, 1).clone()


def _scales(infos: Mapping[str, TensorInfo], weights: Mapping[str, TensorInfo], path: Path) -> dict[str, str]:
    scales: dict[str, str] = {}
    for name, info in infos.items():
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        weight = f"{name.removesuffix(suffix)}.weight"
        if weight not in weights:
            raise ConfigError(f"{path}: {name} is the scale of {weight}, which is missing")
        if weight in scales:
            raise ConfigError(f"{path}: {weight} has two scales, {scales[weight]} and {name}")
        if weights[weight].dtype not in FP8:
            raise _refusal(path, f"{weights[weight].dtype} with a scale ({weight})")
        if not _fits(info.shape, weights[weight].shape):
            raise ConfigError(
                f"{path}: {name} has shape {info.shape}, which does not match {weight} of shape {weights[weight].shape}"
            )
        scales[weight] = name
    return scales


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if math.prod(scale) == 1:
        return True
    if not weight or not scale or scale[0] != weight[0]:
        return False
    if math.prod(scale) == weight[0]:
        return True
    return len(weight) == 2 and len(scale) == 3 and scale[2] == 1 and weight[1] % scale[1] == 0


def _refuse_by_name(infos: Mapping[str, TensorInfo], path: Path) -> None:
    for pattern, kind in _REFUSED:
        if any(pattern.fullmatch(name) for name in infos):
            raise _refusal(path, kind)


def _refuse_by_format(header: Header, path: Path) -> None:
    """Raise if a layer's format, which ComfyUI states in the header or in a tensor, is not supported."""
    said: list[Any] = []
    for name, text in {**header.texts, **header.metadata}.items():
        if name == _HEADER_FORMATS or name in header.texts:
            try:
                content = json.loads(text)
                said += content["layers"].values() if name == _HEADER_FORMATS else [content]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}: {name}, which describes how weights are quantised, cannot be read"
                ) from error
    for layer in said:
        kind = layer.get("format") if isinstance(layer, dict) else layer
        if not str(kind).startswith(FP8):
            raise _refusal(path, f"{kind} (ComfyUI)")


def _refusal(path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"{path}: its weights are quantised as {kind}, which frostline does not support: use "
        "the model in fp16, bf16, fp32, or fp8 with or without scales"
    )
