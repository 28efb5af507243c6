"""The predictor of LAION's improved-aesthetic-predictor, which maps CLIP embeddings of images to ratings from 1 to 10.

Source: github.com/christophschuhmann/improved-aesthetic-predictor. The network consists of linear layers with dropout
between them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.tensor_files import open_tensors

_WIDTHS = (1024, 128, 64, 16, 1)
_DROPOUT = (0.2, 0.2, 0.1, None, None)
_PREFIX = "layers."


def load_predictor(file: Path, dim: int) -> nn.Sequential:
    """Load `sac+logos+ava1-l14-linearMSE.pth`, or the same tensors in a .safetensors file, in float32, frozen.

    Args:
        dim: D of the unit-norm embeddings.
    Returns:
        A module that maps (…, D) to (…, 1).
    Raises:
        ConfigError: the file cannot be read, or has other tensors.
    """
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for before, after, dropout in zip((dim, *_WIDTHS), _WIDTHS, _DROPOUT, strict=False):
            layers.append(nn.Linear(before, after))
            layers += [] if dropout is None else [nn.Dropout(dropout)]
        predictor = nn.Sequential(*layers)
    tensors = open_tensors([file], "cpu")
    state = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in tensors.items()}
    try:
        predictor.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{file}: is not an aesthetic predictor for {dim}-dimensional embeddings: {error}") from error
    return predictor.eval().requires_grad_(False)
