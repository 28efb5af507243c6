"""Make the options of a command from the fields of a settings class: name, type, default, bounds and description.

    @takes_settings(ScoreSettings)
    def score(settings: ScoreSettings, out: Annotated[Path, typer.Option()]) -> None: ...

A field with a plain value becomes an option. A field with nested settings does not; the command must provide it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from frostline.cli.lazy_options import Command, Decorator
from frostline.config import Settings, nested_settings

_SAME_NAMES: Mapping[str, str] = {}


def takes_settings(
    settings: type[Settings], argument: str | None = None, flags: Mapping[str, str] = _SAME_NAMES
) -> Decorator:
    """Replace the parameter `settings` of a command by options, whose values are parsed to that parameter.

    Args:
        argument: the field that is a positional argument.
        flags: flags of fields whose flag is not the field's name.
    Raises:
        ConfigError: (by the command) a value is invalid.
    """
    options = [
        _parameter(name, field, flags.get(name), positional=name == argument)
        for name, field in _plain_fields(settings).items()
    ]
    return _in_place_of("settings", options, settings.parse, {settings.__name__: settings})


def takes_changes(
    settings: type[Settings], fields: Collection[str], flags: Mapping[str, str] = _SAME_NAMES
) -> Decorator:
    """Replace the parameter `changes` of a command by options for `fields`, whose values are passed in that parameter.

    For settings that a file may set as well: an option that is not given has the value None. Its default is only shown
    in the help, because the value in the file takes precedence over it.
    """
    plain = _plain_fields(settings)
    options = [_parameter(name, plain[name], flags.get(name), change=True) for name in plain if name in fields]
    return _in_place_of("changes", options, dict)


def _in_place_of(
    name: str,
    options: list[inspect.Parameter],
    gather: Callable[[dict[str, Any]], Any],
    types: Mapping[str, Any] | None = None,
) -> Decorator:
    """Replace the parameter `name` of a command by options; its value is the result of `gather`.

    Args:
        name: the parameter to replace.
        options: the options, as keyword-only parameters.
        gather: converts the values of the options, by name, to the value of the parameter.
        types: names in the command's annotations that its module imports only for type checking.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            gathered = gather({option.name: values.pop(option.name) for option in options})
            command(**values, **{name: gathered})

        signature = inspect.signature(command, eval_str=True, locals=types)
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for own in signature.parameters.values()
            for parameter in (options if own.name == name else [own])
        ]
        # Typer reads these two attributes.
        cast(Any, run).__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _plain_fields(settings: type[Settings]) -> dict[str, FieldInfo]:
    return {name: field for name, field in settings.model_fields.items() if nested_settings(settings, name) is None}


def _parameter(
    name: str, field: FieldInfo, flag: str | None, positional: bool = False, change: bool = False
) -> inspect.Parameter:
    """Return a Typer parameter for a field; for a `change`, the value is None if the option is not given."""
    kind, optional = _kind(name, field)
    required, default = field.is_required(), None if field.is_required() else _text_of_tuple(field.default)
    help_ = _sentence(f"{field.description}; comma-separated" if kind is tuple else f"{field.description}")
    if positional:
        info = typer.Argument(help=help_)
    else:
        flag = flag or f"--{name.replace('_', '-')}"
        if kind is bool and (change or default):
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        info = typer.Option(
            flag,
            help=help_,
            metavar="|".join(get_args(kind)) or None,
            min=_bound(field, "ge"),
            max=_bound(field, "le"),
            show_default=str(default) if change and default else True,
        )
    # The settings class checks the choices and splits comma-separated values.
    given = kind if isinstance(kind, type) and kind is not tuple else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if change else inspect.Parameter.empty if required else default,
        annotation=Annotated[given | None if change or optional else given, info],
    )


def _kind(name: str, field: FieldInfo) -> tuple[Any, bool]:
    """Return a field's type (`tuple` for any tuple, a `Literal` unchanged), and whether it may be None.

    Raises:
        TypeError: the type has no equivalent option.
    """
    annotation = field.annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [part for part in parts if part is not NoneType]
    kind = tuple if get_origin(kinds[0]) is tuple else kinds[0]
    if len(kinds) != 1 or not (isinstance(kind, type) or get_origin(kind) is Literal) or field.description is None:
        raise TypeError(f"{name}: an option needs a description and one type, not {annotation}")
    return kind, len(parts) > 1


def _text_of_tuple(default: Any) -> Any:
    return ",".join(default) if isinstance(default, tuple) else default


def _bound(field: FieldInfo, side: Literal["ge", "le"]) -> Any:
    """Return the smallest (`ge`) or largest (`le`) value; the settings class checks open bounds."""
    return next((bound for part in field.metadata if (bound := getattr(part, side, None)) is not None), None)


def _sentence(description: str) -> str:
    return f"{description[:1].upper()}{description[1:]}."
