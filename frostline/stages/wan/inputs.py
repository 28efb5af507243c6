"""What the stages of a Wan model are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

# All stages import this file: what it imports is part of what identifies the engines of each.
if TYPE_CHECKING:
    from frostline.models.wan.components import WanComponents
    from frostline.models.wan.denoiser import Denoiser
    from frostline.runtime.dynamic_dim import Dimension
    from frostline.stages.shapes import ShapeRange


@dataclass(frozen=True)
class StageInputs:
    """A loaded model; the denoisers carry the LoRA, if there is one."""

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    shapes: ShapeRange

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the Wan weights."""
        return self.components.dtype

    @property
    def device(self) -> torch.device:
        """Where the Wan weights are."""
        return self.components.device

    def pixels(self, name: str, per_block: int | None = None) -> Dimension:
        """`height` or `width` of a tensor with `per_block` entries where the video has `spatial_multiple` pixels."""
        multiple = self.components.spec.geometry.spatial_multiple
        return self.shapes.pixels(name, multiple if per_block is None else per_block, multiple)
