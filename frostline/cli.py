"""The command line: one sub-command each, no logic. Exit code 2 for usage, 1 for failure."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from frostline import __version__
from frostline.errors import ConfigError, FrostlineError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.split(":")[0] if __doc__ else None)

Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="The engine store.")]


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
    logging.getLogger("frostline").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    engines_dir: EnginesDir = Path("engines"),
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


def main() -> None:
    """The console script."""
    # Threads that spin while they wait take the cores from those that work; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        sys.exit(_say(error, 2))
    except FrostlineError as error:
        sys.exit(_say(error, 1))


def _say(error: FrostlineError, code: int) -> int:
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
    return code
