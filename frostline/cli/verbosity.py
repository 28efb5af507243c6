"""`-v` and `-q` set how much of the log is printed; they may be given before or after the command."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from typing import Annotated, Any, TypeAlias, cast

import typer

from frostline.cli.lazy_options import Command, is_lazy, options_on_use, with_options
from frostline.progress import Progress
from frostline.terminal.logs import console_shows, log_to_console

Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log more, such as loaded files and the time of each stage.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="Log warnings and errors only, without progress bars.")
]


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Set the level of the console log.

    Raises:
        BadParameter: both options are given.
    """
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet cannot be combined")
    if not is_first_process():
        level = logging.ERROR
    else:
        level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    log_to_console(level)


def takes_verbosity(command: Command) -> Command:
    """Add the options `-v` and `-q` to a command; they override those given before the command."""
    if is_lazy(command):
        return options_on_use(lambda: lambda _: takes_verbosity(with_options(command)))(command)

    @functools.wraps(command)
    def run(*, verbose: bool, quiet: bool, **values: Any) -> None:
        if verbose or quiet:
            set_verbosity(verbose, quiet)
        command(**values)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("verbose", Verbose), ("quiet", Quiet))
    ]
    # Typer reads these two attributes.
    cast(Any, run).__signature__ = signature.replace(parameters=[*own, *added])
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


def progress() -> Progress:
    """Return progress bars for the console; hidden with `-q`, and in all processes of a launcher but the first."""
    return Progress(quiet=not console_shows(logging.INFO))


def is_first_process() -> bool:
    """Return whether this is the first process of a launcher; the others print errors only."""
    return os.environ.get("RANK", "0") == "0"
