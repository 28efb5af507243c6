"""What the stages of a model are made from, and the bounds that their engines must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frostline.export.shapes import ShapeRange
from frostline.models.components import WanComponents
from frostline.models.denoiser import Denoiser
from frostline.runtime.stage import Network, Stage, Tolerance

# fp32 engines only reorder sums. A deep network gathers more of that than a shallow one.
FP32 = Tolerance(atol=1e-5, rtol=1e-5, cosine=0.999999)
FP32_DEEP = Tolerance(atol=1e-5, rtol=5e-5, cosine=0.999999)


@dataclass(frozen=True)
class FaceModels:
    """The face networks of the reward.

    detector_networks: `pnet`, `rnet`, `onet` of MTCNN. embedder: what `load_embedder` returns.
    detector_settings: keyword arguments of `BatchedMTCNN`.
    """

    detector_networks: Mapping[str, nn.Module]
    embedder: nn.Module
    detector_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageInputs:
    """A loaded model; the denoisers carry the LoRA, if there is one."""

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    faces: FaceModels
    shapes: ShapeRange

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the Wan weights."""
        return self.components.denoiser.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the Wan weights are."""
        return self.components.denoiser.patch_embedding.weight.device


def single_network_stage(
    network: Network, model: str, tolerance: Tolerance, sample: Callable[[], dict[str, Tensor]] | None = None
) -> Stage:
    """A stage that is one network and nothing around it."""

    def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
        return network.reference(tensors)

    return Stage(
        name=network.name,
        model=model,
        networks=(network,),
        torch=in_torch,
        assemble=lambda runners: runners[network.name],
        sample=sample or (lambda: network.samples("opt")),
        tolerance=tolerance,
    )
