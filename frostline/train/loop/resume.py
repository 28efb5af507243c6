"""What `--resume` means: a checkpoint that is whole, and how the run that goes on from it differs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from frostline.documents import read_yaml
from frostline.errors import CheckpointError, ConfigError, DocumentError
from frostline.models.lora import read_adapter
from frostline.stages.families import family_of
from frostline.train.config_file import dump_settings
from frostline.train.flatten import flatten
from frostline.train.loop.checkpoint import Checkpoint, find_checkpoints, latest_intact
from frostline.train.loop.run_dir import CONFIG
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

LATEST = "latest"
# Where a run is, and what only `--dry-run` reads.
_OF_NO_CONSEQUENCE = ("output_dir", "overwrite_output_dir", "memory.")
# An entry of a list of settings, in a dotted name.
_ENTRY = re.compile(r".*\.\d+\.")


def find_resume(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `resume` means, verified; None where a run is to begin.

    Args:
        resume: `latest`, a checkpoint's folder or its name in `output_dir`, or a folder of checkpoints.
    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if resume is None:
        return None
    if resume == LATEST:
        found = latest_intact(output_dir)
        if found is None:
            log.warning("%s holds no checkpoint yet: starting from the beginning", output_dir)
        return found
    folder = next((path for path in (Path(resume), output_dir / resume) if path.is_dir()), None)
    if folder is None:
        raise CheckpointError(f"{resume}: no such folder to resume from, here or in {output_dir}")
    siblings = [checkpoint for checkpoint in find_checkpoints(folder.parent) if checkpoint.path.name == folder.name]
    if siblings:
        siblings[0].verify()
        return siblings[0]
    found = latest_intact(folder)
    if found is None:
        raise CheckpointError(f"{folder}: is no checkpoint, and holds none")
    return found


def check_fits(checkpoint: Checkpoint, settings: RunSettings) -> None:
    """Hold the adapter of a checkpoint that verified against the settings of the run that is to go on from it.

    Raises:
        ConfigError: it has another rank, another scale, or is on other layers.
    """
    family, lora = family_of(settings.model), settings.lora
    adapter = read_adapter(checkpoint.path, family.layer_path).uniform()
    if adapter.rank != lora.rank:
        raise ConfigError(f"lora.rank: the adapter in {checkpoint.path} has rank {adapter.rank}, not {lora.rank}")
    scale = (lora.rank if lora.alpha is None else lora.alpha) / lora.rank
    if adapter.scale != scale:
        raise ConfigError(
            f"lora.alpha: the adapter in {checkpoint.path} has a scale (alpha / rank) of {adapter.scale:g}, "
            f"not {scale:g}"
        )
    names = lora.target_modules or family.LORA_TARGETS
    targets = {target: re.compile(rf"(?:.*\.)?{re.escape(target)}") for target in names}
    unused = [target for target, pattern in targets.items() if not any(map(pattern.fullmatch, adapter.layers))]
    others = [name for name in adapter.layers if not any(pattern.fullmatch(name) for pattern in targets.values())]
    if unused or others:
        raise ConfigError(
            f"lora.target_modules: the adapter in {checkpoint.path} is on other layers: "
            + (f"there is none called {unused[0]}" if unused else f"{others[0]} is called none of these")
        )


def changed_settings(checkpoint: Checkpoint, settings: RunSettings) -> dict[str, tuple[object, object]]:
    """By dotted name, what a setting was in the run that wrote a checkpoint that verified, and what it is now.

    Raises:
        CheckpointError: its settings cannot be read.
    """
    try:
        saved = read_yaml(checkpoint.path / CONFIG) or {}
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG} {error}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.path / CONFIG} is no mapping of settings")
    before, now = flatten(saved), flatten(dump_settings(settings))
    names = dict.fromkeys((*now, *before))
    # A setting may be newer than the checkpoint; of a list, whole entries came or went, or are of another type.
    entries = {name: _ENTRY.match(name) for name in names}
    same = {place[0] for place in entries.values() if place and _type(before, place[0]) == _type(now, place[0])}
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name) and not name.startswith(_OF_NO_CONSEQUENCE)
        if (name in before and name in now) or ((place := entries[name]) and place[0] not in same)
    }


def _type(values: dict[str, Any], entry: str) -> object:
    return values.get(f"{entry}type")
