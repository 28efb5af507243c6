"""A loaded model with its LoRA and its stages: what training and export both start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from frostline.config import LoraSettings, RewardTerm
from frostline.models.faces.detectors import load_detector
from frostline.models.faces.embedders import load_embedder
from frostline.models.lora.inject import inject_lora
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.vae import use_onednn_conv3d
from frostline.runtime.stage import Stage

from .build import build_stages
from .inputs import FaceModels, StageInputs
from .shapes import ShapeRange

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class StagedModel:
    """A Wan model with its LoRA, its reward's networks and its stages.

    denoiser: carries the LoRA of `lora_config`, or none where that is None.
    faces: the reward's networks, None where it looks at no faces.
    """

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    lora_config: LoraConfig | None
    faces: FaceModels | None
    stages: dict[str, Stage]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.components.device

    def weights(self) -> list[Tensor]:
        """The parameters of all stages, each once."""
        networks = (network for stage in self.stages.values() for network in stage.networks)
        return [*{id(weight): weight for network in networks for weight in network.module.parameters()}.values()]


def stage_model(
    components: WanComponents, lora: LoraSettings | None, reward: RewardTerm | None, shapes: ShapeRange
) -> StagedModel:
    """Inject the LoRA into `components` in place and build all stages.

    Args:
        reward: that of faces, whose networks become stages; None loads none.
    Raises:
        ConfigError: the LoRA or the embedder cannot be had as asked.
    """
    model, high_noise = components.denoiser, components.denoiser_high_noise
    device = components.device
    lora_config = None
    if lora is not None:
        lora_config = inject_lora(model, lora.rank, lora.alpha, lora.target_modules)
    # Live and frozen uses alike: an engine is then compared with the fastest plain PyTorch.
    use_onednn_conv3d(components.vae)
    faces = None if reward is None else _load_faces(reward, device)
    denoiser = Denoiser(model).to(device)
    expert = None if high_noise is None else Denoiser(high_noise).to(device)
    stages = build_stages(StageInputs(components, denoiser, expert, faces, shapes))
    return StagedModel(components, denoiser, expert, lora_config, faces, stages)


def _load_faces(reward: RewardTerm, device: torch.device) -> FaceModels:
    embedder = load_embedder(reward.embedder)
    assert isinstance(embedder, nn.Module)
    detector = load_detector(reward.detector, reward.min_face_size)
    detector.modules().to(device)
    return FaceModels(detector, embedder.to(device))
