"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# `frostline --help` imports no settings.
if TYPE_CHECKING:
    from frostline.config import BaseAdapter
    from frostline.rewards.config import RewardEntry

Model = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, a checkpoint folder, or a recipe.")]
ModelFolder = Annotated[str, typer.Argument(help="tiny, tiny-moe, tiny-ti2v, or a checkpoint folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
EnginesDir = Annotated[Path, typer.Option("--engines-dir", help="The engine store.")]
LoraScale = Annotated[float, typer.Option("--lora-scale", help="Strength of the adapter; 1 is as trained.")]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="NAME[:WEIGHTS],…",
        help="Rewards, comma-separated: face_identity, clip:FOLDER, …, or package.module:Class of your own.",
    ),
]
RewardsFile = Annotated[
    Path | None,
    typer.Option(
        "--rewards-file",
        metavar="FILE",
        help="YAML or JSON with a list of rewards and all their settings, or a training configuration.",
    ),
]
BaseAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--base-adapter",
        metavar="PATH[,scale=S][,expert=low|high]",
        help="A LoRA that is merged into the denoiser as the model is loaded, as base_adapters in training; several of "
        "them by several such options.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|auto|ADDRESS",
        help="Run on a Ray cluster: one that is started on this machine, the one that this machine is in, or "
        "host:port (needs the extra 'ray').",
    ),
]
ENGINES = Path("engines")


def rewards_given(names: Sequence[str] | None, file: Path | None) -> tuple[RewardEntry, ...]:
    """Return the rewards that `--rewards-file` lists, then those of `--reward`; none where neither is given.

    Raises:
        ConfigError: there is no such reward, or it refuses its settings.
    """
    from frostline.rewards.argument import parse_rewards, read_rewards

    listed = () if file is None else read_rewards(file)
    return (*listed, *parse_rewards(names or ()))


def base_adapters_given(arguments: Sequence[str] | None) -> tuple[BaseAdapter, ...]:
    """Return the adapters that `--base-adapter` names. One whose path has a comma belongs in a file.

    Raises:
        ConfigError: one is not as it should be.
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
