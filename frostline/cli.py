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
adapter_app = typer.Typer(no_args_is_help=True, help="Convert a LoRA adapter for other programs, or merge it.")
app.add_typer(adapter_app, name="adapter")

Model = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe.")]
Key = Annotated[str, typer.Argument(help="The key of an engine, or its beginning.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="The engine store.")]
AdapterPath = Annotated[Path, typer.Argument(help="A PEFT folder, or a LoRA .safetensors file.")]
LoraScale = Annotated[float, typer.Option("--lora-scale", help="Strength of the adapter; 1 is as trained.")]
WeightsType = Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or bf16; as they are if not given.")]
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
    from frostline.export.exporter import ensure_verified
    from frostline.export.gain import frozen_uses, live_uses, stage_gains, step_gain
    from frostline.export.recipe import load_recipe
    from frostline.export.run import load_staged_model
    from frostline.export.tables import plan_table, step_gain_lines
    from frostline.models.schedule import FlowMatchSchedule
    from frostline.runtime.runtime import Runtime
    from frostline.runtime.store import EngineStore

    staged = load_staged_model(load_recipe(model, {"precision": precision}), device)
    ensure_verified(staged.stages.values(), EngineStore(engines_dir))
    runtime = Runtime(staged.stages, "auto", engines_dir)
    settings = TrainingModuleSettings()
    schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
    high_noise = schedule.high_noise_steps(staged.components.boundary) if staged.denoiser_high_noise else 0
    steps = (settings.mid_timestep, settings.final_timestep, high_noise)
    console = Console()
    console.print(plan_table(stage_gains(runtime)))
    for line in step_gain_lines(step_gain(runtime, frozen_uses(*steps), live_uses(*steps))):
        console.print(line, soft_wrap=True, highlight=False)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, or a checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="What is to be seen.")],
    out: Annotated[Path, typer.Option("--out", help="The .mp4 file to write.")],
    image: Annotated[Path | None, typer.Option(help="The first frame: a picture or a video.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT folder or a LoRA .safetensors file.")] = None,
    lora_scale: LoraScale = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the start noise.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Euler steps from noise to video.")] = 8,
    shift: Annotated[float, typer.Option(help="Of the sigma schedule.")] = 5.0,
    num_frames: Annotated[int, typer.Option(min=1, help="4k + 1.")] = 81,
    height: Annotated[int | None, typer.Option(help="In pixels; by default the picture's own.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; by default the picture's own.")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 16,
    plan: Annotated[str, typer.Option(help="auto, torch, a backend, or stage=backend,…")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    device: Device = "auto",
    engines_dir: EnginesDir = _ENGINES,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where an engine fails.")] = False,
) -> None:
    """Make a clip from a picture and a prompt, to look at what an adapter does."""
    given = {**locals(), "engines": engines_dir}
    from frostline.progress import Progress
    from frostline.train.sample import SampleSettings, sample_clip

    known = SampleSettings.model_fields
    settings = SampleSettings.parse({name: value for name, value in given.items() if name in known})
    with Progress().task(f"sample {num_frames} frames"):
        clip = sample_clip(settings, out)
    if clip.face_score is not None:
        typer.echo(f"face score {clip.face_score:.3f}, face found in {clip.detection_rate:.0%} of the frames")
    typer.echo(f"wrote {out}")


@app.command()
def score(
    videos: Annotated[list[str] | None, typer.Argument(metavar="VIDEO…", help="Videos or pictures.")] = None,
    reference: Annotated[str | None, typer.Option(help="A picture or video of the person.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="CSV: video[,reference][,prompt], or a dataset's metadata.")
    ] = None,
    detector: Annotated[str, typer.Option(help="mtcnn, yunet or scrfd:PATH.onnx")] = "mtcnn",
    embedder: Annotated[str, typer.Option(help="sface, facenet[:TAG or PATH] or arcface:PATH.onnx")] = "sface",
    backend: Annotated[str, typer.Option(help="auto, torch, or one whose engines are built if need be.")] = "auto",
    every: Annotated[int, typer.Option(help="Score every so many frames.")] = 1,
    max_frames: Annotated[int | None, typer.Option(help="Score at most so many frames of a video.")] = None,
    missing_face: Annotated[str, typer.Option(help="Frames without a face: exclude, or zero.")] = "exclude",
    upscale: Annotated[int, typer.Option(help="Enlarge frames so many times to find small faces.")] = 1,
    min_face_size: Annotated[int, typer.Option(help="Smallest face that mtcnn looks for, in pixels.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Frames of one call of the detector.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Results, .jsonl or .csv, one row a video.")] = None,
    report: Annotated[Path | None, typer.Option(help="One HTML page with curves and pictures.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the results in --out.")] = False,
    fail_under: Annotated[float | None, typer.Option(help="Exit with 1 if the mean score is lower.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Let --pairs name files outside its folder.")
    ] = False,
    device: Device = "auto",
    engines_dir: EnginesDir = _ENGINES,
) -> None:
    """Score videos by how much their face is the reference's: the reward of training, on batched engines."""
    from frostline.progress import Progress
    from frostline.score.request import gather_pairs
    from frostline.score.run import RunOptions, run_score
    from frostline.score.settings import ScoreSettings
    from frostline.score.table import print_outcome

    settings = ScoreSettings.parse(
        {
            "detector": detector,
            "embedder": embedder,
            "upscale": upscale,
            "min_face_size": min_face_size,
            "missing_face": missing_face,
            "every": every,
            "max_frames": max_frames,
        }
    )
    if resume and out is None:
        raise ConfigError("--resume goes on from the results in --out, which is missing")
    wanted = gather_pairs(videos or [], reference, pairs, allow_outside)
    outcome = run_score(wanted, settings, RunOptions(out, resume, backend, device, engines_dir, batch), Progress())
    if outcome is None:
        return
    print_outcome(outcome, Console())
    if report is not None:
        from frostline.score.report import write_score_report

        write_score_report(report, outcome, settings)
    if outcome.summary.failed or (fail_under is not None and not outcome.summary.reaches(fail_under)):
        raise typer.Exit(1)


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


@adapter_app.command()
def convert(
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file, or for peft a folder.")],
    to: Annotated[str, typer.Option("--to", help="peft, diffsynth, comfyui or diffusers.")],
    precision: WeightsType = None,
) -> None:
    """Write an adapter under the names that another program reads."""
    from frostline.models.adapters import read_adapter, write_adapter
    from frostline.models.precision import parse_precision

    write_adapter(read_adapter(adapter), to, out, None if precision is None else parse_precision(precision))
    typer.echo(f"wrote {out}")


@adapter_app.command()
def merge(
    model: Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, or a checkpoint folder.")],
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file.")],
    lora_scale: LoraScale = 1.0,
    precision: WeightsType = None,
) -> None:
    """Write the denoiser (of two experts the low-noise one) with the adapter in its weights, under Wan's own names."""
    from frostline.models.adapters import merge_adapter, read_adapter, write_weights
    from frostline.models.files import find_files
    from frostline.models.precision import parse_precision

    found = read_adapter(adapter)
    tensors = find_files(model).denoiser.read(None if precision is None else parse_precision(precision), "cpu")
    write_weights(merge_adapter(tensors, found, lora_scale), out)
    typer.echo(f"wrote {out}")


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
