"""A loaded model with its LoRA and its stages: what training and export both start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.config import LoraSettings
from frostline.errors import ConfigError
from frostline.models.lora.inject import inject_lora
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.vae import use_onednn_conv3d
from frostline.runtime.stage import Stage

from .build import build_stages
from .inputs import StageInputs
from .shapes import ShapeRange

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class StagedModel:
    """A Wan model with its LoRA and its stages, those of rewards among them.

    denoiser: carries the LoRA of `lora_config`, or none where that is None.
    """

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    lora_config: LoraConfig | None
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
    components: WanComponents, lora: LoraSettings | None, of_rewards: Iterable[Stage], shapes: ShapeRange
) -> StagedModel:
    """Inject the LoRA into `components` in place and build all stages.

    Args:
        of_rewards: the stages that rewards bring.
    Raises:
        ConfigError: the LoRA cannot be had as asked, or two stages go by one name.
    """
    model, high_noise = components.denoiser, components.denoiser_high_noise
    device = components.device
    lora_config = None
    if lora is not None:
        lora_config = inject_lora(model, lora.rank, lora.alpha, lora.target_modules)
    # Live and frozen uses alike: an engine is then compared with the fastest plain PyTorch.
    use_onednn_conv3d(components.vae)
    denoiser = Denoiser(model).to(device)
    expert = None if high_noise is None else Denoiser(high_noise).to(device)
    stages = build_stages(StageInputs(components, denoiser, expert, shapes))
    for stage in of_rewards:
        if stage.name in stages:
            raise ConfigError(f"rewards: the stage {stage.name} is there already: call that of the reward otherwise")
        stages[stage.name] = stage
    return StagedModel(components, denoiser, expert, lora_config, stages)
