"""The command line: one function for each command. The exit code is 2 for wrong usage, and 1 for failure."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer

from frostline import __version__
from frostline.cli import adapters, engines, exporting, recipes, scoring, training
from frostline.cli.lazy_options import LazyOptionsGroup
from frostline.cli.leaving import leave
from frostline.cli.verbosity import Quiet, Verbose, set_verbosity, takes_verbosity
from frostline.errors import ConfigError, FrostlineError
from frostline.terminal import print_error

app = typer.Typer(cls=LazyOptionsGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
for command in (
    *(training.demo, recipes.init, training.cache, training.train, training.report),
    *(exporting.export, exporting.plan),
    *(training.sample, scoring.score),
):
    app.command()(command)
app.add_typer(engines.app, name="engines")
app.add_typer(adapters.app, name="adapter")
for group in (app, engines.app, adapters.app):
    for registered in group.registered_commands:
        if registered.callback is not None:
            registered.callback = takes_verbosity(registered.callback)


def _print_version(version: bool) -> None:
    if version:
        typer.echo(f"frostline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    # Eager, so that `--version` exits before Typer parses the other options, for which it imports pydantic.
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train LoRA adapters of Wan video models on reward feedback, with the frozen stages compiled into engines."""
    set_verbosity(verbose, quiet)
    # Hide the deprecation warnings of torch's tracer: users cannot act on them.
    warnings.simplefilter("ignore", FutureWarning)
    # Hide Pillow's warning about large pictures: `frostline.video` checks the size.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    logging.getLogger("torch").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line."""
    # Limit how long idle OpenMP threads spin: long spinning takes cores from an engine's threads, and without spinning
    # they wake up slowly. libgomp's default of 300000 spins takes some milliseconds. Set this before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Printing a name that is not valid UTF-8 must not fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # By default, SIGTERM ends a process without cleanup. Shells and schedulers expect exit code 128 + signal number.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        code = _say(error, 2)
    except FrostlineError as error:
        code = _say(error, 1)
    except SystemExit as leaving:
        code = leaving.code
    else:
        code = 0
    leave(code)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _say(error: FrostlineError, code: int) -> int:
    print_error(str(error))
    return code
