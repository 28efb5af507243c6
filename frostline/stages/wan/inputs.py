"""The arguments of the functions that build the stages of a Wan model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# All stages import this file, so its imports are part of the engine keys of every stage.
if TYPE_CHECKING:
    from frostline.models.wan.components import WanComponents
    from frostline.models.wan.denoiser import Denoiser
    from frostline.runtime.dynamic_dim import Dimension
    from frostline.stages.shapes import ShapeRange


@dataclass(frozen=True)
class StageInputs:
    """A loaded model, whose denoisers may have a LoRA."""

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    shapes: ShapeRange

    def pixels(self, name: str, per_block: int | None = None) -> Dimension:
        """Return `height` or `width` of a tensor with `per_block` entries for every `spatial_multiple` pixels."""
        multiple = self.components.spec.geometry.spatial_multiple
        return self.shapes.pixels(name, multiple if per_block is None else per_block, multiple)
