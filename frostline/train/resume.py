"""What `--resume` means: a checkpoint that is whole, and how the run that goes on from it differs."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from frostline.errors import CheckpointError
from frostline.train.checkpoint import Checkpoint, find_checkpoints, latest_intact
from frostline.train.configfile import dump_settings
from frostline.train.nested import flatten
from frostline.train.runfolder import CONFIG
from frostline.train.settings import RunSettings

log = logging.getLogger(__name__)

LATEST = "latest"
# Where a run is, and what only `--dry-run` reads.
_OF_NO_CONSEQUENCE = ("output_dir", "overwrite_output_dir", "memory.")


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


def changed_settings(checkpoint: Checkpoint, settings: RunSettings) -> dict[str, tuple[object, object]]:
    """By dotted name, what a setting was in the run that wrote a checkpoint that verified, and what it is now."""
    before = flatten(yaml.safe_load((checkpoint.path / CONFIG).read_text()) or {})
    now = flatten(dump_settings(settings))
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value and not name.startswith(_OF_NO_CONSEQUENCE)
    }
