"""Load the model of a recipe with its stages, or only the stages of its rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.errors import ConfigError
from frostline.rewards.build import build_rewards
from frostline.runtime.device import resolve_device
from frostline.stages.families import family_of
from frostline.stages.staged_model import LoadedStages, StagedModel, stage_model

if TYPE_CHECKING:
    from frostline.export.recipe import Recipe
    from frostline.runtime.stage import Stage


def load_stages(recipe: Recipe, device: str) -> LoadedStages:
    """Load the stages that a recipe exports; the model is only loaded if some of them belong to it.

    Args:
        device: `cpu`, `cuda`, …, or `auto` (a GPU if available).
    Raises:
        ConfigError: the model or a reward cannot be loaded.
    """
    if not recipe.of_rewards_alone:
        return load_staged_model(recipe, device)
    stages: dict[str, Stage] = {}
    for active in build_rewards(recipe.rewards, resolve_device(device), recipe.shapes):
        for stage in active.stages:
            if stage.name in stages:
                raise ConfigError(f"rewards: two rewards have a stage {stage.name}: export them separately")
            stages[stage.name] = stage
    return LoadedStages(stages)


def load_staged_model(recipe: Recipe, device: str) -> StagedModel:
    """Return the recipe's model with its stages, in the recipe's precision.

    Args:
        device: `cpu`, `cuda`, …, or `auto` (a GPU if available).
    Raises:
        ConfigError: the model or a reward cannot be loaded.
    """
    where, family = resolve_device(device), family_of(recipe.model)
    rewards = build_rewards(recipe.rewards, where, recipe.shapes)
    components = family.load(
        recipe.model, recipe.dtype, where, defer=False, base_adapters=recipe.base_adapters, quantization=recipe
    )
    model = family.video_model(components, recipe.lora)
    return stage_model(model, [stage for reward in rewards for stage in reward.stages], recipe.shapes)
