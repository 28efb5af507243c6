"""Load the model that a recipe names, with its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.models.checkpoints.loading import load_components
from frostline.rewards.build import build_rewards
from frostline.runtime.device import resolve_device
from frostline.stages.staged_model import StagedModel, stage_model

if TYPE_CHECKING:
    from frostline.export.recipe import Recipe


def load_staged_model(recipe: Recipe, device: str) -> StagedModel:
    """The recipe's model with its stages, in the recipe's precision.

    Args:
        device: `cpu`, `cuda`, …, or `auto`: a GPU if there is one.
    Raises:
        ConfigError: the model or a reward cannot be loaded.
    """
    rewards = build_rewards(recipe.rewards, resolve_device(device), recipe.shapes)
    components = load_components(recipe.model, recipe.dtype, resolve_device(device))
    stages = [stage for reward in rewards for stage in reward.stages]
    return stage_model(components, recipe.lora, stages, recipe.shapes)
