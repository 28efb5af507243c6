"""Load the model that a recipe names, with its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.rewards.build import build_rewards
from frostline.runtime.device import resolve_device
from frostline.stages.families import family_of
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
    where, family = resolve_device(device), family_of(recipe.model)
    rewards = build_rewards(recipe.rewards, where, recipe.shapes)
    model = family.video_model(family.load(recipe.model, recipe.dtype, where, defer=False), recipe.lora)
    return stage_model(model, [stage for reward in rewards for stage in reward.stages], recipe.shapes)
