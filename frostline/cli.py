"""The command line: one sub-command each, no logic. Exit code 2 for usage, 1 for failure."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from frostline import __version__
from frostline.errors import ConfigError, FrostlineError

if TYPE_CHECKING:
    from frostline.export.outcome import ExportRow

app = typer.Typer(no_args_is_help=True, add_completion=False)
engines_app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, trust and remove built engines.")
app.add_typer(engines_app, name="engines")

Model = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe.")]
Key = Annotated[str, typer.Argument(help="The key of an engine, or its beginning.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="The engine store.")]
_ENGINES = Path("engines")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Reward-feedback LoRA training of Wan video models with the frozen stages in engines."""
    if version:
        typer.echo(f"frostline {__version__}")
        raise typer.Exit
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # Chatter of the tracer that a user can do nothing about.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("frostline").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    engines_dir: EnginesDir = _ENGINES,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    starts: Annotated[int, typer.Option(min=1, help="Held-out starts to score.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of data order and noise.")] = 0,
) -> None:
    """Train a face-identity LoRA on the embedded tiny model and show what it did."""
    from frostline.demo.run import DemoSettings, run_demo
    from frostline.demo.table import print_summary
    from frostline.progress import Progress

    summary = run_demo(out, engines_dir, DemoSettings(steps, starts, seed), Progress())
    print_summary(summary, out)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; see examples/.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.name=value, e.g. lora.rank=16.")] = None,
    resume: Annotated[str | None, typer.Option(help="latest, or a checkpoint folder.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings, explained.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check settings and data, show what would run.")] = False,
) -> None:
    """Train a reward LoRA; under `accelerate launch -m frostline train …` on many GPUs."""
    from frostline.train.configfile import commented_yaml, load_run_settings

    if config is not None and "=" in str(config) and not config.exists():
        config, overrides = None, [str(config), *(overrides or [])]
    settings = load_run_settings(config, overrides or [])
    if print_config:
        typer.echo(commented_yaml(settings), nl=False)
        return
    if config is None:
        raise ConfigError("a configuration file is needed: copy one from examples/")
    from frostline.progress import Progress

    if dry_run:
        from frostline.train.dry_run import print_dry_run

        raise typer.Exit(0 if print_dry_run(settings, Console()) else 1)
    from frostline.train.launch import run_training

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("frostline").setLevel(logging.ERROR)
    outcome = run_training(settings, resume, Progress(quiet=not first))
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    if first:
        typer.echo(f"{outcome.step} steps. The adapter is in {settings.output_dir / 'adapter'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The output_dir of a training run.")]) -> None:
    """Write a training run's report.html."""
    from frostline.train.report import write_report

    typer.echo(f"wrote {write_report(run)}")


@app.command()
def export(
    model: Model,
    stages: Annotated[str | None, typer.Option(help="Comma-separated names, or all.")] = None,
    backend: Annotated[str | None, typer.Option(help="Comma-separated names of backends.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    opset: Annotated[int | None, typer.Option(min=18, max=23, help="ONNX opset.")] = None,
    min_shapes: Annotated[str | None, typer.Option(help="video:1x5x3x64x64,… as trtexec spells them.")] = None,
    opt_shapes: Annotated[str | None, typer.Option(help="The shapes to tune for.")] = None,
    max_shapes: Annotated[str | None, typer.Option(help="The largest shapes.")] = None,
    compute_capability: Annotated[str | None, typer.Option(help="8.9[,12.0] or current, for TensorRT.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="Comma-separated names of adapted layers.")] = None,
    live_lora: Annotated[bool, typer.Option("--live-lora/--no-live-lora", help="LoRA matrices as inputs.")] = True,
    atol: Annotated[float | None, typer.Option(min=0, help="Absolute error allowed.")] = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="Error allowed, relative to the largest value.")] = None,
    cosine: Annotated[float | None, typer.Option(min=-1, max=1, help="Cosine demanded.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT's timing cache file.")] = None,
    device: Device = "auto",
    engines_dir: EnginesDir = _ENGINES,
    force: Annotated[bool, typer.Option("--force", help="Build engines that are there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be built.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first failure.")] = False,
) -> None:
    """Turn the frozen stages of a Wan model into verified, signed engines."""
    from frostline.export.outcome import ExportRow
    from frostline.export.receipt import recall, receipt_key, remember
    from frostline.export.recipe import load_recipe
    from frostline.progress import Progress
    from frostline.runtime.backends.options import OPSET, BuildOptions
    from frostline.runtime.store import EngineStore

    changes: dict[str, Any] = {
        "stages": stages,
        "backends": backend,
        "precision": precision,
        "compute_capabilities": compute_capability,
        "min_shapes": min_shapes,
        "opt_shapes": opt_shapes,
        "max_shapes": max_shapes,
    }
    recipe = load_recipe(model, changes).with_lora(live_lora, lora_targets)
    build = BuildOptions(opset or OPSET, recipe.compute_capabilities, timing_cache)
    store, receipt = EngineStore(engines_dir), receipt_key(recipe, build, device)
    known = None if force or dry_run else recall(store, receipt)
    if known is not None:
        _print_export([ExportRow(m.stage, m.backend, "present", 0.0, m) for m in known])
        return
    from frostline.export.run import ExportOptions, export_model, load_staged_model, planned_exports

    options = ExportOptions(build, force, dry_run, strict, atol, rtol, cosine)
    progress = Progress()
    with progress.task(f"load {recipe.model}"):
        staged = load_staged_model(recipe, device)
    rows = []
    with progress.bar("export", len(planned_exports(staged, recipe))) as bar:
        for row in export_model(staged, recipe, store, options, bar.describe):
            rows.append(row)
            bar.advance(1)
    _print_export(rows)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)
    if not dry_run:
        remember(store, receipt, [row.manifest for row in rows if row.manifest is not None])


def _print_export(rows: list[ExportRow]) -> None:
    from frostline.export.tables import export_notes, export_table

    console = Console()
    console.print(export_table(rows))
    for note in export_notes(rows):
        console.print(note, soft_wrap=True, highlight=False, markup=False)


@app.command()
def plan(
    model: Model,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    device: Device = "auto",
    engines_dir: EnginesDir = _ENGINES,
) -> None:
    """Show, per stage, who could serve it, who does, and why."""
    from frostline.config import TrainingModuleSettings
    from frostline.export.gain import frozen_uses, stage_gains, step_gain
    from frostline.export.recipe import load_recipe
    from frostline.export.run import load_staged_model
    from frostline.export.tables import plan_table, step_gain_line
    from frostline.models.schedule import FlowMatchSchedule
    from frostline.runtime.runtime import Runtime

    staged = load_staged_model(load_recipe(model, {"precision": precision}), device)
    runtime = Runtime(staged.stages, "auto", engines_dir)
    settings = TrainingModuleSettings()
    schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
    high_noise = schedule.high_noise_steps(staged.components.boundary) if staged.denoiser_high_noise else 0
    uses = frozen_uses(settings.mid_timestep, settings.final_timestep, high_noise)
    console = Console()
    console.print(plan_table(stage_gains(runtime)))
    console.print(step_gain_line(step_gain(runtime, uses)))


@engines_app.command("list")
def list_engines(engines_dir: EnginesDir = _ENGINES) -> None:
    """All engines of the store."""
    from frostline.export.tables import engine_table
    from frostline.runtime.store import EngineStore

    Console().print(engine_table(EngineStore(engines_dir).find()))


@engines_app.command()
def inspect(key: Key, engines_dir: EnginesDir = _ENGINES) -> None:
    """The manifest of one engine, as JSON."""
    from frostline.runtime.store import EngineStore

    record = EngineStore(engines_dir).by_key(key)
    if record.manifest is None:
        raise FrostlineError(record.problem or f"engine {record.path} is damaged")
    Console().print_json(record.manifest.model_dump_json())


@engines_app.command()
def verify(
    key: Annotated[str | None, typer.Argument(help="The key of an engine, or its beginning; all if left out.")] = None,
    engines_dir: EnginesDir = _ENGINES,
) -> None:
    """Check signatures and hashes; exit code 1 if one does not hold."""
    from frostline.runtime.store import EngineStore

    store, console, refused = EngineStore(engines_dir), Console(), 0
    for record in store.find() if key is None else [store.by_key(key)]:
        try:
            store.verify(record)
            console.print(f"[green]holds[/] {record.path}")
        except FrostlineError as error:
            refused += 1
            console.print(f"[bold red]refused[/] {error}", soft_wrap=True)
    if refused:
        raise typer.Exit(1)


@engines_app.command()
def trust(path: Annotated[Path, typer.Argument(help="The folder of an engine inside the store.")]) -> None:
    """Sign an engine that was built elsewhere with your key."""
    from frostline.runtime.store import EngineStore

    engine = EngineStore(path.resolve().parents[2]).trust(path)
    typer.echo(f"signed {engine.path}")


@engines_app.command("rm")
def remove(key: Key, engines_dir: EnginesDir = _ENGINES) -> None:
    """Delete one engine."""
    from frostline.runtime.store import EngineStore

    store = EngineStore(engines_dir)
    record = store.by_key(key)
    store.remove(record)
    typer.echo(f"removed {record.path}")


@engines_app.command()
def prune(
    older_than: Annotated[float | None, typer.Option(min=0, help="Remove engines older than this many days.")] = None,
    max_size: Annotated[float | None, typer.Option(min=0, help="Keep the newest that fit this many GB.")] = None,
    engines_dir: EnginesDir = _ENGINES,
) -> None:
    """Delete old engines, and what interrupted builds left."""
    from datetime import timedelta

    from frostline.runtime.store import EngineStore

    age = None if older_than is None else timedelta(days=older_than)
    size = None if max_size is None else int(max_size * 1e9)
    for record in EngineStore(engines_dir).prune(age, size):
        typer.echo(f"removed {record.path}")


def main() -> None:
    """The console script."""
    # Threads that spin while they wait take the cores from those that work; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Typer would turn Ctrl-C into exit code 1; shells and schedulers expect 128 + the signal.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        sys.exit(_say(error, 2))
    except FrostlineError as error:
        sys.exit(_say(error, 1))


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _say(error: FrostlineError, code: int) -> int:
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
    return code
