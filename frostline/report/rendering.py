"""Render the templates of pages. All text is escaped, and control characters are made visible."""

import functools
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from frostline.escaping import printable


def asset(name: str) -> str:
    """Return the text of a file in this package."""
    return resources.files("frostline.report").joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Render a template. Values of the type `Markup` are inserted unchanged; all others are escaped.

    Raises:
        jinja2.UndefinedError: a value that the template uses is missing.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> Environment:
    """Return the Jinja environment of all templates."""
    return Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _shown(value: object) -> object:
    """Escape control characters, also in markup, which can contain untrusted text."""
    text = printable(str(value))
    return Markup(text) if isinstance(value, Markup) else text
