"""`--json`: standard output has one JSON document and nothing else; log and progress are on standard error."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(values: Any) -> None:
    """Print plain values as JSON: ASCII, and null for a number that is not finite."""
    from frostline.documents import finite_values

    typer.echo(json.dumps(finite_values(values), indent=2))
