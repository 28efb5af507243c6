"""Models of transformers from local folders: safetensors alone, every tensor there, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frostline.documents import parse_json
from frostline.errors import ConfigError, DocumentError


def load_pretrained(kind: Any, folder: Path) -> Any:
    """Load `folder` as a model of the class `kind` of transformers, in float32, frozen, in eval mode.

    Raises:
        ConfigError: the folder, its config.json or a tensor is missing, or they are of another model.
    """
    name = kind.__name__
    found = read_json(folder / "config.json", f"a folder of a {name} has one").get("model_type")
    if found != kind.config_class.model_type:
        raise ConfigError(f"{folder}: its config.json is of the type {found!r}, not {kind.config_class.model_type!r}")
    file = folder / "model.safetensors"
    if not file.is_file() and not (folder / f"{file.name}.index.json").is_file():
        raise ConfigError(f"{file}: there is no such file; a folder of a {name} has one")
    return from_transformers(kind, folder, str(folder), use_safetensors=True)


def from_transformers(kind: Any, folder: Path | None, where: str, every_tensor: bool = False, **options: Any) -> Any:
    """Call `kind.from_pretrained`, and insist on all tensors of the model.

    Args:
        folder: None where `options` have `config` and `state_dict`.
        where: what errors name.
        every_tensor: insist that all tensors that are there are the model's, too.
    Raises:
        ConfigError: what is there cannot be read, or a tensor is missing, has another shape or is not known.
    """
    from transformers.utils import logging

    name, shows_progress = kind.__name__, logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many types
        raise ConfigError(f"{where}: cannot be loaded as a {name}: {error}") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"{where}: is no whole {name}: it has no {', '.join(missing[:3])}")
    if mismatched := sorted(found["mismatched_keys"]):
        tensor, given, wanted = mismatched[0]
        raise ConfigError(f"{where}: {tensor} has shape {tuple(given)}, a {name} of its config.json {tuple(wanted)}")
    if every_tensor and (unknown := sorted(found["unexpected_keys"])):
        raise ConfigError(f"{where}: has tensors that a {name} has not: {', '.join(unknown[:3])}")
    return model.eval().requires_grad_(False)


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Read a mapping from a JSON file.

    Args:
        purpose: what is said of the file where there is none.
    Raises:
        ConfigError: there is no such file, or it has something else.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; {purpose}")
    try:
        values = parse_json(path.read_bytes())
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping")
    return values
