"""Files of named tensors, read without running any code of theirs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frostline.errors import ConfigError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .pt or .pth file of tensors alone.

    Raises:
        ConfigError: the file cannot be read, or contains something else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds
        raise ConfigError(f"cannot read weights from {path}: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"cannot read weights from {path}: it contains something else than tensors by name")
    return weights
