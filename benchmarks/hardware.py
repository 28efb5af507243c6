"""Compute with the memory plan which GPUs each recipe of the package fits on, and with which settings.

    python benchmarks/hardware.py            # plan, write the JSON file and print the tables
    python benchmarks/hardware.py --write    # also write the tables between the markers of docs/hardware.md

This works on any machine: no model runs, and no weights are read. The sizes are those of the releases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import RESULTS, write_result
from table import with_tables

from frostline.recipes import recipe_names, training_config
from frostline.train.config_file import load_run_settings
from frostline.train.memory.measures import MEASURES
from frostline.train.memory.search import Remedy, find_remedy
from frostline.train.memory.table import overrides_of
from frostline.train.run_plan import RunPlanner
from frostline.train.settings import RunSettings

BEGIN = "<!-- printed by python benchmarks/hardware.py -->"
PAGE = Path(__file__).parents[1] / "docs" / "hardware.md"
MACHINES = {
    "24 GB": {"device_gb": 24.0},
    "48 GB": {"device_gb": 48.0},
    "80 GB": {"device_gb": 80.0},
    "8x80 GB": {"device_gb": 80.0, "num_processes": 8},
}
# Clip sizes (height, width) of recipes with a fixed dataset; for other recipes, `max_pixels` determines the size.
CLIPS = {"tiny": [(96, 96)]}
_GB = 1e9


def main() -> None:
    """Plan every recipe on every machine, write JSON and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "hardware.json")
    parser.add_argument("--write", action="store_true", help="also write the tables into docs/hardware.md")
    arguments = parser.parse_args()
    recipes = {name: plan_recipe(name) for name in recipe_names() if training_config(name) is not None}
    write_result(arguments.out, {"recipes": recipes})
    tables = render(json.loads(arguments.out.read_text()))
    print(tables)
    if arguments.write:
        PAGE.write_text(with_tables(PAGE.read_text(), tables, BEGIN))


def plan_recipe(name: str) -> dict[str, Any]:
    """Return the memory that a recipe needs on each machine, in bytes, and the settings that make it fit."""
    settings = settings_of(name)
    # One planner for all machines, because the measured sizes do not depend on the memory of a machine.
    planner = RunPlanner(settings, None, on_cpu=False, samples=(1, 0), sizes=CLIPS.get(name, ()))
    shape, estimate = planner.shape(settings), planner.preview(settings).estimate
    machines = {machine: _on_machine(settings, planner, memory) for machine, memory in MACHINES.items()}
    plan = planner.plan(settings)
    return {
        "step": str(shape),
        "lora_rank": settings.lora.rank,
        "model_bytes": sum(planner.weights(settings).stages.values()),
        "checkpoint_bytes": plan.adapter + plan.optimizer,
        "cache_bytes_per_sample": estimate.nbytes,
        "machines": machines,
    }


def settings_of(name: str) -> RunSettings:
    """Return the settings of a recipe on a GPU; if a reward needs ArcFace weights, use only the default reward."""
    settings = load_run_settings(training_config(name), ["device=cuda"])
    if any(getattr(entry, "embedder", "").startswith("arcface:") for entry in settings.rewards):
        return load_run_settings(training_config(name), ["device=cuda", "rewards=[{type: face_identity}]"])
    return settings


def _on_machine(settings: RunSettings, planner: RunPlanner, memory: Mapping[str, Any]) -> dict[str, Any]:
    machine = settings.model_copy(update={"memory": settings.memory.model_copy(update=memory)})
    planner.device_bytes = int(memory["device_gb"] * _GB)
    there = machine.memory.num_processes
    remedy = Remedy((), machine, True, 0)
    if not planner.plan(machine).fits:
        # On one GPU, measures that need several GPUs are not available.
        measures = [each for each in MEASURES if each.costs != "devices" or there > 1]
        remedy = find_remedy(machine, planner, measures)
    chosen = remedy.settings if remedy.fits else machine
    plan = planner.plan(chosen)
    return {
        "fits": remedy.fits,
        "settings": [value for step in remedy.steps for value in overrides_of(step.changes)] if remedy.fits else [],
        "changes_results": remedy.fits and any(step.measure.costs == "results" for step in remedy.steps),
        "least_bytes": None if remedy.fits else remedy.floor,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "precomputed": [*plan.precompute],
        "training_bytes": plan.peak,
        "precompute_bytes": max(plan.precompute.values(), default=0),
        "main_memory_bytes": there * (plan.offloaded_activations + plan.main_memory),
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the tables of all recipes as Markdown."""
    return "\n\n".join(_table(name, recipe) for name, recipe in result["recipes"].items())


def _table(name: str, recipe: Mapping[str, Any]) -> str:
    rank, model = recipe["lora_rank"], _gb(recipe["model_bytes"])
    checkpoint, cache = recipe["checkpoint_bytes"] / 1e6, recipe["cache_bytes_per_sample"] / 1e6
    lines = [
        f"### {name}",
        "",
        f"A step of {recipe['step']}, LoRA of rank {rank}. On disk: weights {model} GB, each checkpoint "
        f"{checkpoint:.0f} MB, the cache {cache:.2f} MB a sample at most.",
        "",
        "| GPU | fits | settings besides the recipe's | recomputed | peak, GB | precompute, GB | main memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for machine, row in recipe["machines"].items():
        given = " ".join(f"`{value}`" for value in row["settings"]) or "none"
        if row["least_bytes"]:
            given = f"at least {_gb(row['least_bytes'])} GB, whatever the size of the videos"
        fits = ("yes, with other results" if row["changes_results"] else "yes") if row["fits"] else "no"
        main_memory = _gb(row["main_memory_bytes"]) if row["main_memory_bytes"] else "-"
        precompute = _gb(row["precompute_bytes"]) if row["precompute_bytes"] else "-"
        what = f"| {machine} | {fits} | {given} | {row['gradient_checkpointing']} | {_gb(row['training_bytes'])} |"
        lines.append(f"{what} {precompute} | {main_memory} |")
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / _GB:.2f}"


if __name__ == "__main__":
    main()
