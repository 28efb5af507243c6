"""The commands `frostline demo`, `cache`, `train`, `report` and `sample`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.lazy_options import Decorator, options_on_use
from frostline.cli.options import ENGINES, BaseAdapters, EnginesDir, RayAddress, base_adapters_given
from frostline.cli.verbosity import is_first_process, progress
from frostline.errors import ConfigError
from frostline.terminal import Terminal

if TYPE_CHECKING:
    from frostline.train.sample_settings import SampleSettings


def demo(
    out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("runs/demo"),
    engines_dir: EnginesDir = ENGINES,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 80,
    starts: Annotated[int, typer.Option(min=1, help="Number of validation samples to score.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order and noise.")] = 0,
) -> None:
    """Train a face-identity LoRA on the built-in tiny model and show the result."""
    from frostline.demo.run import DemoSettings, run_demo
    from frostline.demo.table import print_summary

    outcome, summary = run_demo(out, engines_dir, DemoSettings(steps, starts, seed), progress())
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    print_summary(summary, out)


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file; `frostline init` writes one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.name=value, for example lora.rank=16.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="latest, a checkpoint (name or folder), or a run folder, whose configuration is used if none is given."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Output folder of the run; overrides the configuration.")
    ] = None,
    init_adapter: Annotated[
        Path | None, typer.Option(help="Initial LoRA: a PEFT folder or a .safetensors file.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings with their descriptions.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings and data, and show the run without starting it.")
    ] = False,
    ray: RayAddress = None,
    num_workers: Annotated[int, typer.Option(min=1, help="With --ray: number of training processes.")] = 1,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="With --ray: one GPU for each process.")] = False,
    cpus_per_worker: Annotated[
        float | None, typer.Option(min=0.0, help="With --ray: CPUs for each process; default: 1, or 0 with --use-gpu.")
    ] = None,
    max_failures: Annotated[
        int, typer.Option(min=-1, help="With --ray: number of restarts after a worker is lost; -1: no limit.")
    ] = 3,
    storage_path: Annotated[
        str | None,
        typer.Option(help="With --ray: folder or URL for Ray's state of the run; default: in the run folder."),
    ] = None,
) -> None:
    """Train a reward LoRA; for several GPUs, use `accelerate launch -m frostline train …` or `--ray`."""
    from frostline.train.config_file import commented_yaml, load_run_settings

    if config is not None and "=" in str(config) and not config.exists():
        config, overrides = None, [str(config), *(overrides or [])]
    if config is None and resume is not None:
        from frostline.train.take_up import find_run

        run = find_run(resume, output_dir)
        run.enter()
        config, output_dir, resume = run.config, run.output_dir, run.resume
    # JSON is valid YAML; it keeps paths from being parsed as numbers.
    paths = {"init_adapter": init_adapter, "output_dir": output_dir}
    given = [f"{name}={json.dumps(str(path))}" for name, path in paths.items() if path is not None]
    settings = load_run_settings(config, [*(overrides or []), *given])
    if print_config:
        typer.echo(commented_yaml(settings), nl=False)
        return
    if config is None:
        raise ConfigError(
            "no configuration file: `frostline init NAME` writes one; `--resume DIR` uses the one of a run"
        )

    if dry_run:
        from frostline.train.dry_run import print_dry_run

        raise typer.Exit(0 if print_dry_run(settings, Terminal(), resume) else 1)
    first = is_first_process()
    if ray is not None:
        from frostline.cluster.session import require_ray

        require_ray()
        from frostline.cluster.train_run import TrainCluster, train_on_cluster

        cluster = TrainCluster(ray, num_workers, use_gpu, cpus_per_worker, max_failures, storage_path)
        outcome = train_on_cluster(settings, resume, cluster, progress())
    else:
        from frostline.train.launch import run_training

        outcome = run_training(settings, resume, progress())
    if outcome.stopped_by is not None:
        if first:
            again = f"frostline train --resume {shlex.quote(str(settings.output_dir))}"
            typer.echo(f"stopped after step {outcome.step}; resume with `{again}`", err=True)
        raise typer.Exit(128 + outcome.stopped_by)
    if not first:
        return
    if outcome.verdict:
        typer.echo(f"validation samples: {outcome.verdict}")
    if outcome.stopped_by_judge:
        typer.echo(
            f"ended at step {outcome.step} of {settings.train.max_train_steps}, because the score of a judge "
            f"decreased in {settings.train.stop_when_judge_falls} consecutive validations "
            "(train.stop_when_judge_falls). Continue with --resume latest. The adapter is in "
            f"{settings.output_dir / 'adapter'}"
        )
    else:
        typer.echo(f"{outcome.step} steps. The adapter is in {settings.output_dir / 'adapter'}")


def cache(
    config: Annotated[Path, typer.Argument(help="YAML file of a training run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.name=value, for example data.num_frames=33.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size; default: the batches of the run, which gives bit-identical results."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the required memory and disk space, and how many samples are cached."),
    ] = False,
) -> None:
    """Precompute the outputs of the frozen stages for all samples of a run.

    For several processes, use `accelerate launch -m frostline cache …`.
    """
    from frostline.train.config_file import load_run_settings

    settings = load_run_settings(config, [*(overrides or [])])
    if dry_run:
        from frostline.train.dry_run import print_dry_run

        always = settings.model_copy(update={"precompute": "always"})
        raise typer.Exit(0 if print_dry_run(always, Terminal(), starts=False) else 1)
    from frostline.train.launch import run_precompute

    first = is_first_process()
    done = run_precompute(settings, progress(), batch_size)
    if first:
        typer.echo(f"{done}. The cache is in {settings.frozen_cache_dir}")


def report(run: Annotated[Path, typer.Argument(help="Output folder of a training run.")]) -> None:
    """Write the report.html of a training run."""
    from frostline.train.loop.run_dir import check_is_run

    check_is_run(run)
    # Imports a plotting library, which takes seconds.
    from frostline.train.report.page import write_report

    typer.echo(f"wrote {write_report(run)}")


def _sample_options() -> Decorator:
    from frostline.cli.settings_options import takes_settings
    from frostline.train.sample_settings import SampleSettings

    return takes_settings(SampleSettings, argument="model", flags={"engines": "--engines-dir"})


@options_on_use(_sample_options)
def sample(
    *,
    out: Annotated[Path, typer.Option("--out", help="Output .mp4 file.")],
    settings: SampleSettings,
    base_adapter: BaseAdapters = None,
) -> None:
    """Generate a clip from a prompt and an optional first frame, to see the effect of an adapter."""
    from frostline.train.sample import sample_clip

    settings = settings.model_copy(update={"base_adapters": base_adapters_given(base_adapter)})
    with progress().task(f"sample {settings.num_frames} frames"):
        clip = sample_clip(settings, out)
    if clip.face_score is not None:
        typer.echo(f"face score {clip.face_score:.3f}, face detected in {clip.detection_rate:.0%} of the frames")
    typer.echo(f"wrote {out}")
