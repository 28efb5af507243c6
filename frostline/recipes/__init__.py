"""Export recipes and training configurations that are installed with frostline, by model name."""

from __future__ import annotations

from pathlib import Path

from frostline.atomic_io import atomic_write, check_writable
from frostline.errors import ConfigError

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of all models that have a recipe or a configuration."""
    return sorted({path.stem for path in _FOLDER.glob("*/*.yaml")})


def export_recipe(name: str) -> Path | None:
    """Return the path of the export recipe of a model; None if there is none."""
    return _named("export", name)


def training_config(name: str) -> Path | None:
    """Return the path of the training configuration of a model; None if there is none."""
    return _named("train", name)


def copy_recipes(name: str, folder: Path) -> list[Path]:
    """Copy a model's training configuration to `NAME.yaml`, and its export recipe to `NAME.export.yaml`.

    Returns:
        The files written.
    Raises:
        ConfigError: there is no such name, or a file exists already.
        DataError: the folder cannot be written to.
    """
    sources = {f"{name}.yaml": training_config(name), f"{name}.export.yaml": export_recipe(name)}
    copies = {folder / target: source for target, source in sources.items() if source is not None}
    if not copies:
        raise ConfigError(f"unknown recipe {name!r}: use one of {', '.join(recipe_names())}")
    for target in copies:
        if target.exists():
            raise ConfigError(f"{target} exists already: rename it, or choose another folder")
        check_writable(target)
    for target, source in copies.items():
        with atomic_write(target) as part:
            part.write_bytes(source.read_bytes())
    return [*copies]


def _named(kind: str, name: str) -> Path | None:
    # Compared with the names that exist, so that none can lead out of the folder.
    return _FOLDER / kind / f"{name}.yaml" if name in {path.stem for path in (_FOLDER / kind).glob("*.yaml")} else None
