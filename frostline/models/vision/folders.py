"""Load models of transformers from local folders: safetensors only, all tensors required, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frostline.documents import parse_json
from frostline.errors import ConfigError, DocumentError


def load_pretrained(kind: Any, folder: Path) -> Any:
    """Load `folder` as a model of the transformers class `kind`, in float32, frozen, in eval mode.

    Raises:
        ConfigError: the folder, its config.json or a tensor is missing, or belongs to another model.
    """
    name = kind.__name__
    found = read_json(folder / "config.json", f"a {name} folder contains it").get("model_type")
    if found != kind.config_class.model_type:
        raise ConfigError(f"{folder}: the type in its config.json is {found!r}, not {kind.config_class.model_type!r}")
    file = folder / "model.safetensors"
    if not file.is_file() and not (folder / f"{file.name}.index.json").is_file():
        raise ConfigError(f"{file}: no such file; a {name} folder contains it")
    return from_transformers(kind, folder, str(folder), use_safetensors=True)


def from_transformers(kind: Any, folder: Path | None, where: str, every_tensor: bool = False, **options: Any) -> Any:
    """Call `kind.from_pretrained`, and check that all tensors of the model were loaded.

    Args:
        folder: None if `options` contain `config` and `state_dict`.
        where: source in error messages.
        every_tensor: also check that the model uses all tensors in the files.
    Raises:
        ConfigError: files cannot be read, or a tensor is missing, unknown or has another shape.
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
    except Exception as error:  # transformers and safetensors raise many types of exceptions
        raise ConfigError(f"{where}: cannot be loaded as a {name}: {error}") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"{where}: is not a complete {name}: it has no {', '.join(missing[:3])}")
    if mismatched := sorted(found["mismatched_keys"]):
        tensor, given, wanted = mismatched[0]
        raise ConfigError(
            f"{where}: {tensor} has shape {tuple(given)}, but config.json of this {name} requires {tuple(wanted)}"
        )
    if every_tensor and (unknown := sorted(found["unexpected_keys"])):
        raise ConfigError(f"{where}: has tensors that {name} does not have: {', '.join(unknown[:3])}")
    return model.eval().requires_grad_(False)


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Read a mapping from a JSON file.

    Args:
        purpose: description of the file for the message if it is missing.
    Raises:
        ConfigError: the file is missing or does not contain a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {purpose}")
    try:
        values = parse_json(path.read_bytes())
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping")
    return values
