"""What the stages of a model are made from, and the bounds that their engines must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from frostline.models.precision import precision_name
from frostline.runtime.engines.tolerance import Tolerance

# All stages import this file: what it imports is part of what identifies the engines of each.
if TYPE_CHECKING:
    from frostline.models.wan.components import WanComponents
    from frostline.models.wan.denoiser import Denoiser
    from frostline.runtime.dynamic_dim import Dimension
    from frostline.stages.shapes import ShapeRange

# The bounds by the type of the weights, both sides computing in that type. Measured on small models of random weights,
# the worst of ONNX Runtime, OpenVINO and AOTInductor, relative to the largest output: 6e-6, 3e-3 and 2.6e-2, of which
# the VAE encoder and the face embedder have the most.
_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    # Engines only reorder sums, and a deep network gathers much of that.
    torch.float32: Tolerance(atol=1e-5, rtol=5e-5, cosine=0.999999),
    # 11 bits of mantissa, rounded at other places: engines keep in fp32 what PyTorch rounds between two kernels.
    torch.float16: Tolerance(atol=1e-3, rtol=1e-2, cosine=0.99999),
    # The same with 8 bits.
    torch.bfloat16: Tolerance(atol=8e-3, rtol=8e-2, cosine=0.999),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The bounds that the engine of a stage must keep, its weights being of `dtype`.

    Raises:
        ConfigError: weights cannot be of this type.
    """
    precision_name(dtype)
    return _TOLERANCES[dtype]


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
        multiple = self.components.spatial_multiple
        return self.shapes.pixels(name, multiple if per_block is None else per_block, multiple)
