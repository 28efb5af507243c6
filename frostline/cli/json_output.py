"""`--json`: write one JSON document to standard output; logs and progress go to standard error."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(values: Any) -> None:
    """Print plain values as ASCII JSON; non-finite numbers become null."""
    from frostline.documents import finite_values

    typer.echo(json.dumps(finite_values(values), indent=2))
