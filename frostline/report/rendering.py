"""The templates of pages: all text in them is escaped, and nothing in it steers what shows the page."""

import functools
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from frostline.escaping import printable


def asset(name: str) -> str:
    """Return the text of a file that lies beside this one in the package."""
    return resources.files("frostline.report").joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Return a template with its values put in; values that are `Markup` are trusted, all others are text.

    Raises:
        jinja2.UndefinedError: the template uses a value that is missing.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> Environment:
    """Return the environment of all templates."""
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
    """Write out control characters, in markup as well: parts of it may come from text that was joined to it."""
    text = printable(str(value))
    return Markup(text) if isinstance(value, Markup) else text
