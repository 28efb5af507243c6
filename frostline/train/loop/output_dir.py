"""The output folder of a run: check whether the run may use it, and delete the files of an earlier run."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frostline.errors import CheckpointError, ConfigError
from frostline.models.lora import EXPERT_PARTS
from frostline.train.loop.checkpoint import Checkpoint, discard, find_checkpoints
from frostline.train.loop.run_dir import (
    ADAPTER,
    ADAPTER_EMA,
    BEGAN_FROM,
    CLIPS,
    CONFIG,
    LOG,
    METRICS,
    PROGRAM,
    REPORT,
    RUN_FACTS,
    SHEET,
    TIMING,
    TRACKERS,
    VALIDATION,
    read_facts,
)

_FILES = (METRICS, VALIDATION, CONFIG, REPORT, SHEET, TIMING, LOG)
# The adapters of two experts are in one folder each.
_EXPERTS = "|".join(EXPERT_PARTS.values())
_OWN_ADAPTER = rf"(?:(?:{_EXPERTS})/)?(?:adapter_config\.json|adapter_model\.safetensors)"
# The files of a run, by path in the folder; no other files are ever deleted.
_OWN = re.compile(
    "|".join(
        (
            *map(re.escape, _FILES),
            rf"(?:{ADAPTER}|{ADAPTER_EMA})/{_OWN_ADAPTER}",
            rf"{CLIPS}/(?:truth|reference|step-\d{{6,}})/(?:(?:lossless/)?\d+\.mp4|{re.escape(SHEET)})",
            rf"{CLIPS}/step-\d{{6,}}\.csv",
            rf"{TRACKERS}/.*",
            rf"checkpoint-\d+/(?:{_OWN_ADAPTER}|(?:optimizer|adapter_ema|(?:random|rollout)-\d+)\.safetensors"
            rf"|state\.json|{re.escape(CONFIG)}|manifest\.json)",
            r"\.checkpoint-\d+\.[0-9a-f]{8}\.(?:partial|replaced)/.*",
        )
    ),
    re.DOTALL,
)
# The folders of a run.
_PLACE = re.compile(
    rf"(?:{ADAPTER}|{ADAPTER_EMA})(?:/(?:{_EXPERTS}))?"
    rf"|{CLIPS}(?:/(?:truth|reference|step-\d{{6,}})(?:/lossless)?)?|{TRACKERS}(?:/.*)?"
    rf"|checkpoint-\d+(?:/(?:{_EXPERTS}))?|\.checkpoint-\d+\.[0-9a-f]{{8}}\.(?:partial|replaced)(?:/(?:{_EXPERTS}))?",
    re.DOTALL,
)
# Name of a file that `atomic_write` has not completed.
_PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)


def check_writable(folder: Path) -> None:
    """Check that a run can write to the folder, which need not exist; creates no folder and leaves no file.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        # An unnamed temporary file.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to: {error.strerror}") from error


def begins_in(folder: Path, resume: Checkpoint | None) -> bool:
    """Return whether the run is new to the folder; it may still resume from a checkpoint elsewhere."""
    return resume is None or resume.path.parent.resolve() != folder.resolve()


def origin(resume: Checkpoint | None) -> str | None:
    """Return the entry of `run.json` for the checkpoint that a run starts from."""
    return None if resume is None else str(resume.path.resolve())


def began_from(folder: Path) -> str | None:
    """Return the origin of the run in the folder."""
    return (_facts(folder) or {}).get(BEGAN_FROM)


def check_start(folder: Path, resume: Checkpoint | None = None, overwrite: bool = False, restart: bool = False) -> None:
    """Check that a run may start in the folder without mixing its files with others; changes nothing.

    Args:
        resume: a checkpoint in another folder that the run starts from.
        overwrite: an existing run may be deleted.
        restart: an existing run may be deleted if it has the same origin and no checkpoint to resume from.
    Raises:
        ConfigError: the folder contains a run that must not be deleted, or files of other programs that this run would
            overwrite.
        CheckpointError: the folder cannot be read.
    """
    try:
        checkpoints = find_checkpoints(folder)
        names = (*_FILES, RUN_FACTS, ADAPTER, ADAPTER_EMA, CLIPS, TRACKERS)
        found = [checkpoint.path for checkpoint in checkpoints]
        found += [folder / name for name in names if _has_content(folder / name)]
        strange = _strange_files(folder, checkpoints)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    if not found:
        return
    facts = _facts(folder)
    if facts is None:
        raise ConfigError(
            f"{folder} already contains {found[0].name}, but no run of frostline (there is no "
            f"{RUN_FACTS}): choose another output_dir"
        )
    same = facts.get(BEGAN_FROM) == origin(resume)
    if restart and not checkpoints and not same and not overwrite:
        began = f"from {facts[BEGAN_FROM]}" if facts.get(BEGAN_FROM) else "at step 0"
        raise ConfigError(
            f"{folder} contains a run that started {began}, and has no checkpoint yet: start it "
            "again from there, choose another output_dir, or set overwrite_output_dir"
        )
    if not overwrite and not (restart and not checkpoints):
        raise ConfigError(
            f"{folder} already contains a run ({found[0].name}): resume it (--resume latest), "
            "choose another output_dir, or set overwrite_output_dir"
        )
    if strange:
        raise ConfigError(f"{strange[0]} was not written by a run: move it, or choose another output_dir")


def is_run(folder: Path) -> bool:
    """Return whether the folder contains a run of frostline: `run.json` is the first file that a run writes."""
    return _facts(folder) is not None


def clear_run(folder: Path) -> None:
    """Delete the files of a run and nothing else; `run.json` last, so that an interrupted deletion can be repeated.

    Raises:
        CheckpointError: a file cannot be deleted.
    """
    try:
        # First of all, so that a run whose deletion is interrupted cannot be resumed.
        discard(find_checkpoints(folder))
        for path in [*_own_files(folder)]:
            path.unlink()
        for place in [*_own_places(folder)]:
            if not any(place.iterdir()):
                place.rmdir()
        (folder / RUN_FACTS).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be deleted: {error.strerror}") from error


def clear_unfinished(folder: Path) -> None:
    """Delete incomplete files of a run that was killed.

    Raises:
        CheckpointError: a file cannot be deleted.
    """
    try:
        for path in [path for path in folder.iterdir() if _PART.fullmatch(path.name) and _is_own(Path(path.name))]:
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be deleted: {error.strerror}") from error


def _facts(folder: Path) -> dict[str, Any] | None:
    """Return the content of `run.json`, if it belongs to a run of frostline."""
    facts = read_facts(folder)
    return facts if PROGRAM in facts else None


def _own_files(folder: Path) -> Iterator[Path]:
    """Return the files of a run except `run.json`, complete or not."""
    for place in (folder, *_own_places(folder)):
        yield from (path for path in place.iterdir() if _is_own(path.relative_to(folder)) and not path.is_dir())


def _own_places(folder: Path) -> Iterator[Path]:
    """Return the folders of a run, inner ones first; links are not followed."""
    for top in folder.iterdir():
        if _PLACE.fullmatch(top.name) and not top.is_symlink():
            places = (Path(place) for place, _, _ in os.walk(top, topdown=False))
            yield from (place for place in places if _PLACE.fullmatch(place.relative_to(folder).as_posix()))


def _is_own(path: Path) -> bool:
    part = _PART.fullmatch(path.name)
    final = path.with_name(part[1]).as_posix() if part else path.as_posix()
    return _OWN.fullmatch(final) is not None or (part is not None and final == RUN_FACTS)


def _strange_files(folder: Path, checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Return files inside checkpoints that a run did not write, and that would be deleted with them."""
    inside = [path for checkpoint in checkpoints for path in (checkpoint.path, *checkpoint.path.rglob("*"))]
    return [path for path in inside if path.is_symlink() or not (path.is_dir() or _is_own(path.relative_to(folder)))]


def _has_content(path: Path) -> bool:
    """Return whether the path is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
