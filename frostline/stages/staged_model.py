"""Loaded stages: those of a model with its LoRA, for training and export, or only those of rewards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.errors import ConfigError
from frostline.runtime.stage import Stage

from .shapes import ShapeRange
from .video_model import VideoModel


@dataclass(frozen=True)
class LoadedStages:
    """Stages by name, on one device."""

    stages: dict[str, Stage]

    @property
    def device(self) -> torch.device:
        """Return the device of their networks."""
        return next(iter(self.stages.values())).networks[0].device

    def weights(self) -> list[Tensor]:
        """Return the parameters of all stages, without duplicates."""
        networks = (network for stage in self.stages.values() for network in stage.networks)
        return [*{id(weight): weight for network in networks for weight in network.module.parameters()}.values()]


@dataclass(frozen=True)
class StagedModel(LoadedStages):
    """A video model with its LoRA and its stages, including those of rewards."""

    model: VideoModel

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.device


def stage_model(model: VideoModel, of_rewards: Iterable[Stage], shapes: ShapeRange) -> StagedModel:
    """Create all stages of a model.

    Args:
        of_rewards: the stages of rewards.
    Raises:
        ConfigError: two stages have the same name.
    """
    stages = {stage.name: stage for stage in model.stages(shapes)}
    for stage in of_rewards:
        if stage.name in stages:
            raise ConfigError(
                f"rewards: a stage {stage.name} already exists: choose another name for the reward's stage"
            )
        stages[stage.name] = stage
    return StagedModel(stages, model)
