"""The commands `frostline export` and `frostline plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.json_output import Json, print_json
from frostline.cli.lazy_options import Decorator, options_on_use
from frostline.cli.leaving import at_once
from frostline.cli.options import (
    ENGINES,
    BaseAdapters,
    Device,
    EnginesDir,
    Model,
    Rewards,
    RewardsFile,
    base_adapters_given,
    rewards_given,
)
from frostline.cli.verbosity import progress
from frostline.errors import ConfigError
from frostline.experts import Experts
from frostline.terminal import Terminal

if TYPE_CHECKING:
    from frostline.export.recipe import Recipe
    from frostline.export.result import ExportRow
    from frostline.rewards.config import RewardEntry


def _export_options() -> Decorator:
    from frostline.cli.settings_options import takes_changes
    from frostline.export.recipe import Recipe

    return takes_changes(
        Recipe,
        Recipe.model_fields.keys() - {"model"},
        flags={"backends": "--backend", "compute_capabilities": "--compute-capability"},
    )


def _plan_options() -> Decorator:
    from frostline.cli.settings_options import takes_changes
    from frostline.config import QuantizationSettings
    from frostline.export.recipe import Recipe

    return takes_changes(Recipe, {"precision", *QuantizationSettings.model_fields})


@options_on_use(_export_options)
@at_once
def export(
    *,
    model: Annotated[
        str,
        typer.Argument(
            help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe; not needed to export rewards only."
        ),
    ] = "",
    changes: dict[str, Any],
    reward: Rewards = None,
    rewards_file: RewardsFile = None,
    base_adapter: BaseAdapters = None,
    opset: Annotated[int | None, typer.Option(min=18, max=23, help="ONNX opset.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="Comma-separated names of the adapted layers.")] = None,
    lora_experts: Annotated[
        Experts | None, typer.Option(help="Experts that get a LoRA, in a model with two experts: low, high or both.")
    ] = None,
    live_lora: Annotated[
        bool, typer.Option("--live-lora/--no-live-lora", help="Make the LoRA matrices inputs of the engines.")
    ] = True,
    atol: Annotated[float | None, typer.Option(min=0, help="Maximum absolute error.")] = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="Maximum error relative to the largest value.")] = None,
    cosine: Annotated[float | None, typer.Option(min=-1, max=1, help="Minimum cosine similarity.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT timing cache file.")] = None,
    device: Device = "auto",
    engines_dir: EnginesDir = ENGINES,
    force: Annotated[bool, typer.Option("--force", help="Rebuild existing engines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the engines to build and exit.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first failure.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Number of parallel builds; default: as many as cores and memory allow."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build verified, signed engines for the frozen stages of a Wan model and of rewards.

    Options override the recipe. If only stages of rewards are selected, the model is not loaded.
    """
    from frostline.export.export_cache import Receipt, recall, receipt_key, remember
    from frostline.export.recipe import reward_recipe
    from frostline.export.result import ExportRow
    from frostline.runtime.backends.base.options import OPSET, BuildOptions
    from frostline.runtime.engines.store import EngineStore

    rewards = rewards_given(reward, rewards_file)
    if model:
        recipe = _recipe_with(model, changes, rewards, base_adapter).with_lora(live_lora, lora_targets, lora_experts)
    elif base_adapter:
        raise ConfigError("--base-adapter: requires a model")
    elif rewards:
        recipe = reward_recipe(rewards, changes)
    else:
        raise ConfigError("nothing to export: give a model or a recipe, or rewards with --reward")
    build = BuildOptions(opset or OPSET, recipe.compute_capabilities, recipe.asked_maximum, timing_cache)
    bounds = {"atol": atol, "rtol": rtol, "cosine": cosine}
    store, receipt = EngineStore(engines_dir), receipt_key(recipe, build, device, bounds)
    known = None if force or dry_run else recall(store, receipt)
    if known is not None:
        _print_export([ExportRow(m.stage, m.backend, "present", 0.0, m) for m in known], as_json)
        return
    recipe.check(device)
    from frostline.export.model import load_stages
    from frostline.export.parallel_build import fitting_jobs
    from frostline.export.run import ExportOptions, export_model, planned_exports

    bars = progress()
    with bars.task(f"load {'the rewards' if recipe.of_rewards_alone else recipe.model}"):
        staged = load_stages(recipe, device)
    options = ExportOptions(build, force, dry_run, strict, jobs or fitting_jobs(staged), **bounds)
    rows = []
    with bars.bar("export", len(planned_exports(staged, recipe))) as bar:
        for row in export_model(staged, recipe, store, options, bar.describe):
            rows.append(row)
            bar.advance(1)
    _print_export(rows, as_json)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)
    if not dry_run:
        remember(store, receipt, [Receipt.of(row.manifest, row.bounds) for row in rows if row.manifest and row.bounds])


@options_on_use(_plan_options)
def plan(
    *,
    model: Model,
    changes: dict[str, Any],
    reward: Rewards = None,
    rewards_file: RewardsFile = None,
    base_adapter: BaseAdapters = None,
    device: Device = "auto",
    engines_dir: EnginesDir = ENGINES,
    as_json: Json = False,
) -> None:
    """Show the available backends of each stage, the selected one, and the reason."""
    from frostline.config import LoraSettings
    from frostline.export.as_json import plan_values
    from frostline.export.exporter import ensure_verified
    from frostline.export.model import load_staged_model
    from frostline.export.plan_estimate import stage_gains, step_gain
    from frostline.export.tables import plan_table, step_gain_lines
    from frostline.models.denoise_steps import DenoiseSteps
    from frostline.rewards.build import resolve
    from frostline.runtime.engines.store import EngineStore
    from frostline.runtime.runtime import Runtime
    from frostline.train.step_settings import TrainingModuleSettings

    recipe = _recipe_with(model, changes, rewards_given(reward, rewards_file), base_adapter)
    staged = load_staged_model(recipe, device)
    ensure_verified(staged.stages.values(), EngineStore(engines_dir))
    runtime = Runtime(staged.stages, "auto", engines_dir)
    settings = TrainingModuleSettings(lora=recipe.lora or LoraSettings())
    steps = DenoiseSteps.of(settings, staged.model.boundary, len(staged.model.experts) > 1)
    uses = [*staged.model.uses(steps), *(use for reward in resolve(recipe.rewards) for use in reward.step_uses())]
    gains, step = stage_gains(runtime), step_gain(runtime, uses)
    if as_json:
        print_json(plan_values(gains, step))
        return
    console = Terminal()
    console.print(plan_table(gains))
    for line in step_gain_lines(step):
        console.print(line, soft_wrap=True, highlight=False)


def _recipe_with(
    model: str, changes: dict[str, Any], rewards: tuple[RewardEntry, ...], base_adapter: BaseAdapters
) -> Recipe:
    """Return the recipe of a model with the given options."""
    from frostline.export.recipe import load_recipe

    given = {"rewards": rewards or None, "base_adapters": base_adapters_given(base_adapter) or None}
    return load_recipe(model, {**changes, **given})


def _print_export(rows: list[ExportRow], as_json: bool) -> None:
    from frostline.export.as_json import export_values
    from frostline.export.tables import export_notes, export_table

    if as_json:
        print_json(export_values(rows))
        return
    console = Terminal()
    console.print(export_table(rows))
    for note in export_notes(rows):
        console.print(note, soft_wrap=True, highlight=False, markup=False)
