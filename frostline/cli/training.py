"""`frostline demo`, `train`, `report` and `sample`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import ENGINES, EnginesDir
from frostline.cli.settings_options import takes_settings
from frostline.errors import ConfigError
from frostline.terminal import Terminal
from frostline.train.sample_settings import SampleSettings


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("runs/demo"),
    engines_dir: EnginesDir = ENGINES,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    starts: Annotated[int, typer.Option(min=1, help="Held-out starts to score.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of data order and noise.")] = 0,
) -> None:
    """Train a face-identity LoRA on the embedded tiny model and show what it did."""
    from frostline.demo.run import DemoSettings, run_demo
    from frostline.demo.table import print_summary
    from frostline.progress import Progress

    outcome, summary = run_demo(out, engines_dir, DemoSettings(steps, starts, seed), Progress())
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    print_summary(summary, out)


def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; `frostline init` writes one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.name=value, e.g. lora.rank=16.")] = None,
    resume: Annotated[str | None, typer.Option(help="latest, a checkpoint's name, or its folder.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings, explained.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check settings and data, show what would run.")] = False,
) -> None:
    """Train a reward LoRA; under `accelerate launch -m frostline train …` on many GPUs."""
    from frostline.train.config_file import commented_yaml, load_run_settings

    if config is not None and "=" in str(config) and not config.exists():
        config, overrides = None, [str(config), *(overrides or [])]
    settings = load_run_settings(config, overrides or [])
    if print_config:
        typer.echo(commented_yaml(settings), nl=False)
        return
    if config is None:
        raise ConfigError("a configuration file is needed: `frostline init NAME` writes one")
    from frostline.progress import Progress

    if dry_run:
        from frostline.train.dry_run import print_dry_run

        raise typer.Exit(0 if print_dry_run(settings, Terminal(), resume) else 1)
    from frostline.train.launch import run_training

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("frostline").setLevel(logging.ERROR)
    outcome = run_training(settings, resume, Progress(quiet=not first))
    if outcome.stopped_by is not None:
        if first:
            typer.echo(f"stopped after step {outcome.step}: --resume latest goes on from there", err=True)
        raise typer.Exit(128 + outcome.stopped_by)
    if first:
        typer.echo(f"{outcome.step} steps. The adapter is in {settings.output_dir / 'adapter'}")


def report(run: Annotated[Path, typer.Argument(help="The output_dir of a training run.")]) -> None:
    """Write a training run's report.html."""
    from frostline.train.report.page import write_report

    typer.echo(f"wrote {write_report(run)}")


@takes_settings(SampleSettings, argument="model", flags={"engines": "--engines-dir"})
def sample(
    *,
    out: Annotated[Path, typer.Option("--out", help="The .mp4 file to write.")],
    settings: SampleSettings,
) -> None:
    """Make a clip from a picture and a prompt, to look at what an adapter does."""
    from frostline.progress import Progress
    from frostline.train.sample import sample_clip

    with Progress().task(f"sample {settings.num_frames} frames"):
        clip = sample_clip(settings, out)
    if clip.face_score is not None:
        typer.echo(f"face score {clip.face_score:.3f}, face found in {clip.detection_rate:.0%} of the frames")
    typer.echo(f"wrote {out}")
