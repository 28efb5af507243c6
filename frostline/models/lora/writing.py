"""Write adapters in the format of each program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.atomic_io import atomic_write
from frostline.errors import ConfigError, DataError

from .adapter import Adapter, LoraPair, is_finite
from .names import DiffusersPath, LayerPath, denoiser_path, diffusers_path
from .reading import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from peft import LoraConfig

PEFT = "peft"


@dataclass(frozen=True)
class Format:
    """The tensor names of a program, and the features that its files support.

    Attributes:
        prefix: prefix of the layer's path.
        down, up: suffixes of the matrices A and B.
        stores_alpha: whether a tensor `.alpha` gives the scale; otherwise (except with PEFT's config) it is multiplied
            into B.
        diffusers: whether layers have diffusers' names.
        flat: whether layer paths have underscores instead of dots.
        convolutions, differences: whether the program supports these.
    """

    prefix: str
    down: str
    up: str
    stores_alpha: bool = False
    diffusers: bool = False
    flat: bool = False
    convolutions: bool = True
    differences: bool = False


# Sources: see `names`. ComfyUI uses the full name for the difference of a parameter that does not belong to a
# submodule.
FORMATS: Mapping[str, Format] = {
    PEFT: Format("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "diffsynth": Format("", ".lora_A.default.weight", ".lora_B.default.weight", convolutions=False),
    "comfyui": Format("diffusion_model.", ".lora_down.weight", ".lora_up.weight", stores_alpha=True, differences=True),
    "diffusers": Format("transformer.", ".lora_A.weight", ".lora_B.weight", diffusers=True),
    "musubi": Format(
        "lora_unet_", ".lora_down.weight", ".lora_up.weight", stores_alpha=True, flat=True, convolutions=False
    ),
}


def write_adapter(
    adapter: Adapter,
    name: str,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    layer_path: LayerPath = denoiser_path,
    in_diffusers: DiffusersPath = diffusers_path,
) -> None:
    """Write `adapter` in one of `FORMATS`: a folder for PEFT, otherwise one safetensors file.

    Args:
        dtype: dtype of all tensors except alphas; unchanged if not given.
        layer_path: returns the path of a layer in the denoiser.
        in_diffusers: returns the path of a layer in diffusers.
    Raises:
        ConfigError: the format is unknown, needs another kind of file, or cannot represent the adapter; a layer does
            not exist in the denoiser or in diffusers; a value is too large for `dtype`.
        DataError: `out` cannot be written.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
    if name != PEFT and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: an adapter in {name} format must be a .safetensors file")
    style = FORMATS[name]
    _check_expressible(adapter, name, layer_path)
    names = (
        _names_in_diffusers(adapter, in_diffusers) if style.diffusers else {layer: layer for layer in adapter.layers}
    )
    tensors = _pairs(adapter, style, names, folded=not style.stores_alpha and name != PEFT, dtype=dtype)
    for parameter, difference in adapter.differences.items():
        tensors[style.prefix + _difference_name(parameter)] = difference.to(dtype or difference.dtype)
    for tensor_name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ConfigError(
                f"{adapter.path}: {tensor_name} has values too large for {tensor.dtype}: use --precision bf16 or fp32"
            )
    if name == PEFT:
        write_peft(tensors, _peft_config(adapter), out)
    else:
        write_tensors(tensors, out)


def write_peft(tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, like `PeftModel.save_pretrained`.

    Raises:
        DataError: the folder cannot be written.
    """
    write_tensors(tensors, folder / WEIGHTS_FILE)
    try:
        config.save_pretrained(str(folder))
    except OSError as error:
        raise DataError(f"{folder / CONFIG_FILE}: cannot be written: {error.strerror or error}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file atomically.

    Raises:
        DataError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_write(path) as part:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error


def _check_expressible(adapter: Adapter, name: str, layer_path: LayerPath) -> None:
    style = FORMATS[name]
    if unknown := next((layer for layer in sorted(adapter.layers) if layer_path(layer) != layer), None):
        raise ConfigError(f"{adapter.path} has the layer {unknown}, which the denoiser does not have")
    if adapter.differences and not style.differences:
        raise ConfigError(
            f"{adapter.path} has differences of {len(adapter.differences)} whole parameters besides its LoRA, the "
            f"first of {min(adapter.differences)}, which the {name} format does not support: convert it to comfyui, or "
            f"merge it into a model"
        )
    convolution = next((layer for layer, pair in adapter.layers.items() if pair.down.ndim > 2), None)
    if convolution and not style.convolutions:
        raise ConfigError(
            f"{adapter.path} changes {convolution}, a convolution, which {name} does not support: choose another format"
        )


def _names_in_diffusers(adapter: Adapter, in_diffusers: DiffusersPath) -> dict[str, str]:
    names: dict[str, str] = {}
    for layer in adapter.layers:
        name = in_diffusers(layer)
        if name is None:
            raise ConfigError(f"{adapter.path}: the layer {layer} does not exist in diffusers: choose another format")
        names[layer] = name
    return names


def _pairs(
    adapter: Adapter, style: Format, names: Mapping[str, str], *, folded: bool, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the matrices of all layers.

    Args:
        names: name of each layer in the format.
    """
    tensors: dict[str, Tensor] = {}
    for layer, pair in adapter.layers.items():
        name = style.prefix + (names[layer].replace(".", "_") if style.flat else names[layer])
        up = pair.scale * pair.up.float() if folded else pair.up
        tensors[name + style.down] = pair.down.to(dtype or pair.down.dtype)
        tensors[name + style.up] = up.to(dtype or pair.up.dtype)
        if style.stores_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(pair.alpha))
    return tensors


def _difference_name(parameter: str) -> str:
    """Return ComfyUI's name for the difference of a parameter."""
    layer, _, leaf = parameter.rpartition(".")
    return {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}.get(leaf, f"{parameter}.diff")


def _peft_config(adapter: Adapter) -> LoraConfig:
    """Return a config with the most common rank and alpha, and the full paths of the layers with other values."""
    from peft import LoraConfig

    pairs: Mapping[str, LoraPair] = adapter.layers
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes fractions too
        target_modules=sorted(pairs),
        rank_pattern={layer: pair.rank for layer, pair in pairs.items() if pair.rank != rank},
        alpha_pattern={layer: pair.alpha for layer, pair in pairs.items() if pair.alpha != alpha},  # type: ignore[arg-type]
    )
