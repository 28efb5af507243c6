"""Export a whole model: every stage of a recipe on every backend of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from frostline.errors import ConfigError, EngineError
from frostline.export.exporter import export_stage
from frostline.export.model import StagedModel, stage_model
from frostline.export.outcome import ExportRow, Status
from frostline.export.recipe import ALL_STAGES, Recipe
from frostline.export.traces import Traces
from frostline.models.loading import load_components
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.options import BuildOptions
from frostline.runtime.stage import Stage, Tolerance
from frostline.runtime.store import EngineStore


@dataclass(frozen=True)
class ExportOptions:
    """How to export, beside what the recipe says.

    build: what backends heed. force: build engines that are there. dry_run: only say what would be built.
    strict: stop at the first failure. atol, rtol, cosine: put over every stage's own tolerance.
    """

    build: BuildOptions = field(default_factory=BuildOptions)
    force: bool = False
    dry_run: bool = False
    strict: bool = False
    atol: float | None = None
    rtol: float | None = None
    cosine: float | None = None

    def tolerance(self, of_stage: Tolerance) -> Tolerance:
        """The tolerance of a stage with this export's bounds over it."""
        bounds = {"atol": self.atol, "rtol": self.rtol, "cosine": self.cosine}
        return replace(of_stage, **{name: bound for name, bound in bounds.items() if bound is not None})


def load_staged_model(recipe: Recipe, device: str) -> StagedModel:
    """The recipe's model with its stages, in the recipe's precision.

    Args:
        device: `cpu`, `cuda`, …, or `auto`: a GPU if there is one.
    Raises:
        ConfigError: the model cannot be loaded.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    components = load_components(recipe.model, recipe.dtype, device)
    return stage_model(components, recipe.lora, recipe.reward, recipe.shapes)


def export_model(
    staged: StagedModel,
    recipe: Recipe,
    store: EngineStore,
    options: ExportOptions,
    announce: Callable[[str], None] = lambda step: None,
) -> Iterator[ExportRow]:
    """Export what the recipe names, one row as each is done; a failure is a row, and the others go on.

    Args:
        announce: told what is going on, in a few words.
    Raises:
        ConfigError: the recipe names a stage that the model does not have, or an unknown or unavailable backend.
        EngineError: `strict`, and an export failed.
    """
    traces: dict[str, Traces] = {}
    for backend, stage in planned_exports(staged, recipe):
        # One stage's at a time.
        traces = {stage.name: traces.get(stage.name, Traces())}
        if options.dry_run:
            yield ExportRow(stage.name, backend, "planned", 0.0)
            continue
        stage = replace(stage, tolerance=options.tolerance(stage.tolerance))
        start = time.monotonic()
        announce(f"{backend} {stage.name}")
        try:
            exported = export_stage(
                stage,
                backend,
                store,
                force=options.force,
                options=options.build,
                traces=traces[stage.name],
                progress=lambda step, stage=stage, backend=backend: announce(f"{backend} {stage.name}: {step}"),
            )
        except EngineError as error:
            if options.strict:
                raise
            yield ExportRow(stage.name, backend, "failed", time.monotonic() - start, note=str(error))
            continue
        note = f"built, not verified here: {exported.unverified}" if exported.unverified else ""
        status: Status = "built" if exported.built else "present"
        yield ExportRow(stage.name, backend, status, time.monotonic() - start, exported.manifest, note)


def planned_exports(staged: StagedModel, recipe: Recipe) -> list[tuple[str, Stage]]:
    """Backend and stage of each export, in order: stage by stage, so that a stage is traced once.

    Raises:
        ConfigError: see `export_model`.
    """
    for backend in recipe.backends:
        if reason := get_backend(backend).unavailable():
            raise ConfigError(f"backend {backend}: {reason}")
    names = _stage_names(recipe.stages, staged.stages)
    return [(backend, staged.stages[name]) for name in names for backend in recipe.backends]


def _stage_names(wanted: Sequence[str], known: dict[str, Stage]) -> Sequence[str]:
    if ALL_STAGES in wanted:
        return list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"the model has no stage {name!r}; it has {', '.join(known)}")
    return wanted
