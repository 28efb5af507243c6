"""Export a whole model: every stage of a recipe on each of its backends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from frostline.errors import ConfigError, EngineError
from frostline.export.exporter import all_built, export_stage
from frostline.export.limits import served_note
from frostline.export.parallel_build import Seconds, build_ahead
from frostline.export.recipe import ALL_STAGES, Recipe
from frostline.export.result import ExportRow, Status
from frostline.export.tracing.trace_cache import Traces
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity.fingerprint import precision_of
from frostline.runtime.stage import Stage
from frostline.stages.staged_model import LoadedStages


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export that are not in the recipe.

    Attributes:
        build: build options of the backends.
        force: rebuild existing engines.
        dry_run: list the engines of the recipe, without building.
        strict: stop at the first failure.
        atol, rtol, cosine: override the tolerance of every stage.
        jobs: number of build processes; see `frostline.export.parallel_build.fitting_jobs`.
    """

    build: BuildOptions = field(default_factory=BuildOptions)
    force: bool = False
    dry_run: bool = False
    strict: bool = False
    jobs: int = 1
    atol: float | None = None
    rtol: float | None = None
    cosine: float | None = None

    def tolerance(self, of_stage: Tolerance) -> Tolerance:
        """Return the tolerance of a stage, overridden by the bounds of this export."""
        bounds = {"atol": self.atol, "rtol": self.rtol, "cosine": self.cosine}
        return replace(of_stage, **{name: bound for name, bound in bounds.items() if bound is not None})


def export_model(
    staged: LoadedStages,
    recipe: Recipe,
    store: EngineStore,
    options: ExportOptions,
    announce: Callable[[str], None] = lambda step: None,
) -> Iterator[ExportRow]:
    """Export the stages of a recipe; yield a row after each. A failure yields a row and does not stop the others.

    With several jobs, all engines are built first and then verified in this process, because latencies must be measured
    without other load.

    Args:
        announce: called with a short description of each phase.
    Raises:
        ConfigError: the recipe names a stage that the model does not have, or an unknown or unavailable backend.
        EngineError: `strict`, and an export failed.
    """
    planned = planned_exports(staged, recipe)
    ahead = {} if options.dry_run else _build_ahead(staged, recipe, planned, store, options, announce)
    traces: dict[str, Traces] = {}
    for backend, stage in planned:
        # Keep only the traces of the current stage.
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
                force=options.force and (stage.name, backend) not in ahead,
                options=options.build,
                traces=traces[stage.name],
                progress=lambda step, stage=stage, backend=backend: announce(f"{backend} {stage.name}: {step}"),
            )
        except EngineError as error:
            if options.strict:
                raise
            yield ExportRow(stage.name, backend, "failed", time.monotonic() - start, note=str(error))
            continue
        unverified = f"built, not verified here: {exported.unverified}" if exported.unverified else ""
        note = "; ".join(filter(None, (unverified, served_note(stage, exported.manifest))))
        built_here = exported.built or (stage.name, backend) in ahead
        status: Status = "built" if built_here else "present"
        seconds = ahead.get((stage.name, backend), 0.0) + time.monotonic() - start
        yield ExportRow(stage.name, backend, status, seconds, exported.manifest, note, stage.tolerance)


def planned_exports(staged: LoadedStages, recipe: Recipe) -> list[tuple[str, Stage]]:
    """Return backend and stage of each export, stage by stage, so that each stage is traced once.

    Raises:
        ConfigError: see `export_model`.
    """
    for backend in recipe.backends:
        if reason := get_backend(backend).unavailable():
            raise ConfigError(f"backend {backend}: {reason}")
    names = _stage_names(recipe.stages, staged.stages)
    stages = [staged.stages[name] for name in names]
    return [(backend, stage) for stage in stages for backend in recipe.backends_for(precision_of(stage))]


def _build_ahead(
    staged: LoadedStages,
    recipe: Recipe,
    planned: Sequence[tuple[str, Stage]],
    store: EngineStore,
    options: ExportOptions,
    announce: Callable[[str], None],
) -> Seconds:
    """Build in several processes if several stages have to be built."""
    if options.jobs == 1:
        return {}
    lacking = [
        stage
        for stage in {stage.name: stage for _, stage in planned}.values()
        if options.force or not all_built(stage, recipe.backends_for(precision_of(stage)), store, options.build)
    ]
    if len(lacking) < 2:
        return {}
    jobs = min(options.jobs, len(lacking))
    return build_ahead(staged, recipe, lacking, store, options.build, jobs=jobs, force=options.force, announce=announce)


def _stage_names(wanted: Sequence[str], known: dict[str, Stage]) -> Sequence[str]:
    if ALL_STAGES in wanted:
        return list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"the model has no stage {name!r}; valid stages: {', '.join(known)}")
    return wanted
