"""Read files of named tensors without executing any code in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frostline.errors import ConfigError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .pt or .pth file that contains only tensors.

    Raises:
        ConfigError: the file cannot be read, or contains something other than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own types of exceptions
        raise ConfigError(f"cannot read weights from {path}: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"cannot read weights from {path}: it contains something other than named tensors")
    return weights
