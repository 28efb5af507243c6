"""Options that a command gets when it is used: `frostline --help` then imports no settings.

def _options() -> Decorator:
    from frostline.score.settings import ScoreSettings

    return takes_settings(ScoreSettings)


@options_on_use(_options)
def score(settings: ScoreSettings) -> None: ...


app = typer.Typer(cls=LazyOptionsGroup)
app.command()(score)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import typer
from typer.core import TyperGroup

Command: TypeAlias = Callable[..., None]
Decorator: TypeAlias = Callable[[Command], Command]

_MAKE_OPTIONS = "make_options"


def options_on_use(options: Callable[[], Decorator]) -> Decorator:
    """Decorate a command with what `options` returns, once a `LazyOptionsGroup` has found that it is used.

    Until then the command has a name and a help text, and no options.
    """

    def decorate(command: Command) -> Command:
        def make() -> Command:
            return options()(command)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            make()(**values)

        # Typer reads both.
        cast(Any, run).__signature__ = inspect.Signature()
        run.__annotations__ = {}
        setattr(run, _MAKE_OPTIONS, make)
        return run

    return decorate


def with_options(command: Command) -> Command:
    """Return a command with its options; one that is not decorated by `options_on_use` is returned as it is."""
    make = getattr(command, _MAKE_OPTIONS, None)
    return command if make is None else make()


def is_lazy(command: object) -> bool:
    """Return whether a command gets its options when it is used."""
    return hasattr(command, _MAKE_OPTIONS)


class LazyOptionsGroup(TyperGroup):
    """A group that makes the options of a command when its arguments are parsed or completed, or its help is shown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and remaining arguments, as Click's groups do."""
        name, command, remaining = super().resolve_command(ctx, args)
        if command is not None and is_lazy(command.callback):
            program = typer.Typer(add_completion=False)
            program.command(command.name)(with_options(cast(Command, command.callback)))
            command = typer.main.get_command(program)
        return name, command, remaining
