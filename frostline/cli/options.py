"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe.")]
WanModel = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, or a checkpoint folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="The engine store.")]
LoraScale = Annotated[float, typer.Option("--lora-scale", help="Strength of the adapter; 1 is as trained.")]
ENGINES = Path("engines")
