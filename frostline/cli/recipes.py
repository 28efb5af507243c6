"""The command `frostline init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.recipes import copy_recipes, recipe_names


def _names(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


def init(
    name: Annotated[
        str | None, typer.Argument(help="Name of a model; lists the names if not given.", autocompletion=_names)
    ] = None,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder.")] = Path(),
) -> None:
    """Copy the training configuration and the export recipe of a model, for editing."""
    if name is None:
        typer.echo("\n".join(recipe_names()))
        return
    for path in copy_recipes(name, folder):
        typer.echo(f"wrote {path}")
