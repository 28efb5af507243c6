"""Resolve `--resume` to a complete checkpoint, and compare the settings of the run that resumes from it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from frostline.config import LoraSettings, QuantizationSettings
from frostline.documents import read_yaml
from frostline.errors import CheckpointError, ConfigError, DocumentError
from frostline.experts import ExpertName
from frostline.models.lora import Adapter, UniformLora, read_trained_adapters
from frostline.models.lora.base_adapters import adapter_digests
from frostline.stages.families import family_of
from frostline.train.config_file import dump_settings
from frostline.train.flatten import flatten
from frostline.train.loop.checkpoint import (
    BASE_ADAPTERS,
    Checkpoint,
    check_same_experts,
    find_checkpoints,
    latest_intact,
    read_state,
)
from frostline.train.loop.run_dir import CONFIG, LATEST
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

# Settings that do not affect results directly: the location of the run, and the machine of the memory plan.
_OF_NO_CONSEQUENCE = ("output_dir", "overwrite_output_dir", "memory.")
# The index of a list entry in a dotted name.
_ENTRY = re.compile(r".*\.\d+\.")


def find_resume(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """Return the verified checkpoint for `resume`; None to start from the beginning.

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
            log.warning("%s contains no checkpoint yet: starting from the beginning", output_dir)
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
        raise CheckpointError(f"{folder}: is not a checkpoint and contains none")
    return found


def check_fits(checkpoint: Checkpoint, settings: RunSettings) -> None:
    """Check a verified checkpoint against the settings of the run that resumes from it.

    Raises:
        ConfigError: the adapter belongs to other experts, has another rank, scale or layers, or was trained on other
            base adapters, on other contents of these, or on a base with another quantization; or the settings contain
            an initial adapter that the run did not start with.
        CheckpointError: the state or the settings cannot be read.
    """
    check_same_experts(checkpoint, settings.lora)
    read_trained(checkpoint.path, settings)
    before, now = _saved_settings(checkpoint), dump_settings(settings)
    if now["init_adapter"] not in (None, before.get("init_adapter")):
        raise ConfigError(
            f"init_adapter: {settings.init_adapter} would be ignored, because {checkpoint.path} "
            "contains its own adapter: remove the setting, or start a new run"
        )
    if now["base_adapters"] != before.get("base_adapters", []):
        raise ConfigError(
            f"base_adapters: the adapter in {checkpoint.path} was trained on {_listed(before)}, not on {_listed(now)}"
        )
    if adapter_digests(adapter.path for adapter in settings.base_adapters) != read_state(checkpoint).get(
        BASE_ADAPTERS, []
    ):
        raise ConfigError(
            f"base_adapters: a file of {_listed(now)} has changed since {checkpoint.path} was saved: restore the file, "
            "or start a new run from the adapter with init_adapter"
        )
    for name in QuantizationSettings.model_fields:
        if now[name] != before.get(name, "none"):
            raise ConfigError(
                f"{name}: the adapter in {checkpoint.path} was trained with {before.get(name, 'none')}, "
                f"not with {now[name]}: keep the setting, or start a new run from the adapter with "
                "init_adapter"
            )


def read_trained(path: Path, settings: RunSettings) -> dict[ExpertName, Adapter]:
    """Read the adapters in a folder or file that a run with these settings continues to train, by expert.

    Raises:
        ConfigError: an adapter cannot be read, has another rank, scale or layers, or there are adapters of two experts
            but one is trained; the message names the path.
    """
    family, lora = family_of(settings.model), settings.lora
    adapters = read_trained_adapters(path, family.layer_path, lora.experts)
    loras = [adapter.uniform() for adapter in adapters.values()]
    for adapter in loras:
        _check_sizes(path, adapter, lora)
    # A layer may exist only in the expert with more blocks.
    layers = {layer: None for adapter in loras for layer in adapter.layers}
    names = lora.target_modules or family.LORA_TARGETS
    targets = {target: re.compile(rf"(?:.*\.)?{re.escape(target)}") for target in names}
    unused = [target for target, pattern in targets.items() if not any(map(pattern.fullmatch, layers))]
    others = [name for name in layers if not any(pattern.fullmatch(name) for pattern in targets.values())]
    if unused or others:
        raise ConfigError(
            f"lora.target_modules: the adapter in {path} is on other layers: "
            + (f"there is no layer {unused[0]}" if unused else f"{others[0]} matches none of these")
        )
    return adapters


def _check_sizes(path: Path, adapter: UniformLora, lora: LoraSettings) -> None:
    if adapter.rank != lora.rank:
        raise ConfigError(f"lora.rank: the adapter in {path} has rank {adapter.rank}, not {lora.rank}")
    scale = (lora.rank if lora.alpha is None else lora.alpha) / lora.rank
    if adapter.scale != scale:
        raise ConfigError(
            f"lora.alpha: the adapter in {path} has a scale (alpha / rank) of {adapter.scale:g}, not {scale:g}"
        )


def changed_settings(checkpoint: Checkpoint, settings: RunSettings) -> dict[str, tuple[object, object]]:
    """Return changed settings by dotted name: the value in the run of a verified checkpoint, and the new value.

    Raises:
        CheckpointError: its settings cannot be read.
    """
    before, now = flatten(_saved_settings(checkpoint)), flatten(dump_settings(settings))
    names = dict.fromkeys((*now, *before))
    # A setting may be newer than the checkpoint; in a list, entries may have been added, removed or changed in type.
    entries = {name: _ENTRY.match(name) for name in names}
    same = {place[0] for place in entries.values() if place and _type(before, place[0]) == _type(now, place[0])}
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name) and not name.startswith(_OF_NO_CONSEQUENCE)
        if (name in before and name in now) or ((place := entries[name]) and place[0] not in same)
    }


def _saved_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of the run of a checkpoint; empty if the run had none.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        saved = read_yaml(checkpoint.path / CONFIG) or {}
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG} {error}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.path / CONFIG} is not a mapping of settings")
    return saved


def _listed(settings: dict[str, Any]) -> str:
    """Format the base adapters in the settings for a message."""
    adapters = settings.get("base_adapters") or []
    return json.dumps(adapters) if adapters else "the base model only"


def _type(values: dict[str, Any], entry: str) -> object:
    return values.get(f"{entry}type")
