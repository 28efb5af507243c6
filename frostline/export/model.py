"""A loaded model together with all stages that it can export: what training and export both start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from frostline.config import LoraSettings, RewardTerm
from frostline.export.shapes import ShapeRange
from frostline.export.stages import FaceModels, StageInputs, build_stages
from frostline.models.components import WanComponents
from frostline.models.denoiser import Denoiser
from frostline.models.faces.detectors import load_detector
from frostline.models.faces.embedders import load_embedder
from frostline.models.lora import inject_lora
from frostline.models.vae import use_onednn_conv3d
from frostline.runtime.stage import Stage

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class StagedModel:
    """A Wan model with its LoRA, its reward's networks and its stages.

    denoiser: carries the LoRA of `lora_config`, or none where that is None.
    """

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    lora_config: LoraConfig | None
    embedder: nn.Module
    detector_networks: nn.ModuleDict
    stages: dict[str, Stage]


def stage_model(
    components: WanComponents, lora: LoraSettings | None, reward: RewardTerm, shapes: ShapeRange
) -> StagedModel:
    """Inject the LoRA into `components` in place and build all stages.

    Raises:
        ConfigError: the LoRA or the embedder cannot be had as asked.
    """
    model, high_noise = components.denoiser, components.denoiser_high_noise
    device = model.patch_embedding.weight.device
    lora_config = None
    if lora is not None:
        lora_config = inject_lora(model, lora.rank, lora.alpha, lora.target_modules)
    # Live and frozen uses alike: an engine is then compared with the fastest plain PyTorch.
    use_onednn_conv3d(components.vae)
    embedder = load_embedder(reward.embedder)
    assert isinstance(embedder, nn.Module)
    embedder.to(device)
    detector = load_detector(reward.detector, reward.min_face_size)
    detector_networks = detector.modules().to(device)
    faces = FaceModels(detector, embedder)
    denoiser = Denoiser(model).to(device)
    expert = None if high_noise is None else Denoiser(high_noise).to(device)
    stages = build_stages(StageInputs(components, denoiser, expert, faces, shapes))
    return StagedModel(components, denoiser, expert, lora_config, embedder, detector_networks, stages)
