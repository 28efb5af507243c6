"""Add the options of a command only when it is used, so that `frostline --help` does not import the settings.

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
    """Decorate a command whose options a `LazyOptionsGroup` adds when the command is used.

    Until then, the command has only a name and a help text.

    Args:
        options: returns the decorator that adds the options.
    """

    def decorate(command: Command) -> Command:
        def make() -> Command:
            return options()(command)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            make()(**values)

        # Typer reads these two attributes.
        cast(Any, run).__signature__ = inspect.Signature()
        run.__annotations__ = {}
        setattr(run, _MAKE_OPTIONS, make)
        return run

    return decorate


def with_options(command: Command) -> Command:
    """Return a command with its options; return a command without `options_on_use` unchanged."""
    make = getattr(command, _MAKE_OPTIONS, None)
    return command if make is None else make()


def is_lazy(command: object) -> bool:
    """Return whether the options of a command are added when it is used."""
    return hasattr(command, _MAKE_OPTIONS)


class LazyOptionsGroup(TyperGroup):
    """A command group that adds the options of a command when it is parsed or completed, or its help is shown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and remaining arguments; see `click.Group.resolve_command`."""
        name, command, remaining = super().resolve_command(ctx, args)
        if command is not None and is_lazy(command.callback):
            program = typer.Typer(add_completion=False)
            program.command(command.name)(with_options(cast(Command, command.callback)))
            command = typer.main.get_command(program)
        return name, command, remaining
