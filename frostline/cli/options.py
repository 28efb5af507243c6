"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# Keeps `frostline --help` from importing the settings.
if TYPE_CHECKING:
    from frostline.config import BaseAdapter
    from frostline.rewards.config import RewardEntry

Model = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe.")]
ModelFolder = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, or a checkpoint folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto (a GPU if available).")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="Folder of the engine store.")]
LoraScale = Annotated[
    float, typer.Option("--lora-scale", help="Scale of the adapter; 1 is the scale it was trained with.")
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="NAME[:WEIGHTS],…",
        help="Comma-separated rewards: face_identity, clip:FOLDER, …, or your own class as package.module:Class.",
    ),
]
RewardsFile = Annotated[
    Path | None,
    typer.Option(
        "--rewards-file",
        metavar="FILE",
        help="YAML or JSON file with a list of rewards and their settings, or a training configuration.",
    ),
]
BaseAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--base-adapter",
        metavar="PATH[,scale=S][,expert=low|high]",
        help="LoRA to merge into the denoiser when the model is loaded, as base_adapters in a "
        "training configuration; may be given several times.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|auto|ADDRESS",
        help="Run on a Ray cluster: local (started on this machine), auto (the cluster that this machine belongs "
        "to), or its address host:port (needs the extra 'ray').",
    ),
]
ENGINES = Path("engines")


def rewards_given(names: Sequence[str] | None, file: Path | None) -> tuple[RewardEntry, ...]:
    """Return the rewards of `--rewards-file`, then those of `--reward`; an empty tuple if neither is given.

    Raises:
        ConfigError: a reward does not exist, or its settings are invalid.
    """
    from frostline.rewards.argument import parse_rewards, read_rewards

    listed = () if file is None else read_rewards(file)
    return (*listed, *parse_rewards(names or ()))


def base_adapters_given(arguments: Sequence[str] | None) -> tuple[BaseAdapter, ...]:
    """Return the adapters of `--base-adapter`. A path that contains a comma must be given in a configuration file.

    Raises:
        ConfigError: an argument is invalid.
    """
    from frostline.config import BaseAdapter
    from frostline.documents import parse_value
    from frostline.errors import ConfigError, DocumentError

    adapters = []
    for argument in arguments or ():
        path, *changes = argument.split(",")
        try:
            pairs = [(name.strip(), parse_value(value)) for name, _, value in (c.partition("=") for c in changes)]
            adapters.append(BaseAdapter.parse({**dict(pairs), "path": path}))
        except (ConfigError, DocumentError) as error:
            raise ConfigError(f"--base-adapter {argument}: {error}") from None
    return tuple(adapters)
