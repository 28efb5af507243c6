"""The `frostline engines` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from frostline.cli.json_output import Json, print_json
from frostline.cli.options import ENGINES, EnginesDir
from frostline.errors import ConfigError, FrostlineError
from frostline.terminal import Terminal

app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, trust, export and remove engines.")


def _keys(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the engine keys that begin with `incomplete`, with stage and backend, for shell completion."""
    from frostline.runtime.engines.store import EngineStore

    found = [record.id for record in EngineStore(Path(context.params.get("engines_dir") or ENGINES)).find()]
    return [(each.key, f"{each.stage} on {each.backend}") for each in found if each.key.startswith(incomplete)]


Key = Annotated[str, typer.Argument(help="Key of an engine, or the beginning of the key.", autocompletion=_keys)]


@app.command("list")
def list_engines(engines_dir: EnginesDir = ENGINES, as_json: Json = False) -> None:
    """List all engines in the store without verifying them."""
    from frostline.export.as_json import engine_values
    from frostline.export.tables import engine_table
    from frostline.runtime.engines.store import EngineStore

    records = EngineStore(engines_dir).find()
    if as_json:
        print_json(engine_values(records))
    else:
        Terminal().print(engine_table(records))


@app.command()
def inspect(key: Key, engines_dir: EnginesDir = ENGINES) -> None:
    """Print the manifest of an engine as JSON."""
    from frostline.runtime.engines.store import EngineStore

    record = EngineStore(engines_dir).by_key(key)
    if record.manifest is None:
        raise FrostlineError(record.problem or f"engine {record.path} is damaged")
    Terminal().print_json(record.manifest.model_dump_json())


@app.command()
def verify(
    key: Annotated[
        str | None,
        typer.Argument(
            help="Key of an engine, or the beginning of the key; all engines if not given.", autocompletion=_keys
        ),
    ] = None,
    engines_dir: EnginesDir = ENGINES,
    as_json: Json = False,
) -> None:
    """Check signatures and hashes; the exit code is 1 if an engine fails."""
    from frostline.runtime.engines.store import EngineStore

    if not engines_dir.is_dir():
        raise ConfigError(f"{engines_dir}: no such folder of engines: set --engines-dir")
    store, console = EngineStore(engines_dir), Terminal(quiet=as_json)
    problems: dict[str, str | None] = {}
    for record in store.find() if key is None else [store.by_key(key)]:
        try:
            store.verify(record)
            problems[str(record.path)] = None
            console.print(f"[green]valid[/] {escape(str(record.path))}", soft_wrap=True, highlight=False)
        except FrostlineError as error:
            problems[str(record.path)] = str(error)
            console.print(f"[bold red]refused[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    if as_json:
        print_json({"engines": [{"path": path, "problem": problem} for path, problem in problems.items()]})
    if any(problem is not None for problem in problems.values()):
        raise typer.Exit(1)


@app.command()
def trust(path: Annotated[Path, typer.Argument(help="Folder of an engine in the store.")]) -> None:
    """Sign, with your key, an engine that was built on another machine."""
    from frostline.runtime.engines.store import EngineStore

    engine = EngineStore.of_engine(path).trust(path)
    typer.echo(f"signed {engine.path}")


@app.command()
def export(
    key: Key,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the files.")],
    engines_dir: EnginesDir = ENGINES,
) -> None:
    """Copy the ONNX files of an engine to DIR, with a script that runs them on onnxruntime and numpy only."""
    from frostline.export.publish import publish
    from frostline.runtime.engines.store import EngineStore

    store = EngineStore(engines_dir)
    for path in publish(store.verify(store.by_key(key)), folder):
        typer.echo(f"wrote {path}")


@app.command("rm")
def remove(key: Key, engines_dir: EnginesDir = ENGINES) -> None:
    """Delete an engine."""
    from frostline.runtime.engines.store import EngineStore

    store = EngineStore(engines_dir)
    record = store.by_key(key)
    store.remove(record)
    typer.echo(f"removed {record.path}")


@app.command()
def prune(
    older_than: Annotated[float | None, typer.Option(min=0, help="Remove engines older than this many days.")] = None,
    max_size: Annotated[
        float | None, typer.Option(min=0, help="Keep the newest engines up to this total size in GB.")
    ] = None,
    engines_dir: EnginesDir = ENGINES,
) -> None:
    """Delete old engines and the remains of interrupted builds."""
    from datetime import timedelta

    from frostline.runtime.engines.store import EngineStore

    age = None if older_than is None else timedelta(days=older_than)
    size = None if max_size is None else int(max_size * 1e9)
    for record in EngineStore(engines_dir).prune(age, size):
        typer.echo(f"removed {record.path}")
