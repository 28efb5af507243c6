"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193): the content of an image as a unit vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from frostline.errors import ConfigError

from .folders import load_pretrained
from .preparation import Preparation

if TYPE_CHECKING:
    from transformers import Dinov2Model


class Dinov2(nn.Module):
    """Map prepared images to the unit vector of the class token; differentiable with respect to the pixels.

    Input and output are float32, for weights of any floating-point type.

    Args:
        image_size: S, side of its input in pixels; a multiple of the patch size.
    Attributes:
        dim: D.
    """

    def __init__(self, model: Dinov2Model, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.dim = int(model.config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, D)."""
        x = self.model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state[:, 0]
        return F.normalize(x.float(), dim=1)


def load_dinov2(folder: Path) -> tuple[Dinov2, Preparation]:
    """Load a folder written by `Dinov2Model.save_pretrained` and by the processor, in float32.

    Raises:
        ConfigError: files are missing or belong to another model.
    """
    from transformers import Dinov2Model

    model, prepare = load_pretrained(Dinov2Model, folder), Preparation.read(folder)
    if prepare.crop % model.config.patch_size:
        raise ConfigError(
            f"{folder}: the image size {prepare.crop} is not a multiple of the patch size {model.config.patch_size}"
        )
    return Dinov2(model, prepare.crop), prepare
