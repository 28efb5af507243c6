"""Write checkpoints atomically, find them, verify them by SHA-256, and delete old ones.

A checkpoint is a folder `checkpoint-N`, where N is the number of completed optimizer steps. It contains these files,
none of them pickled:

- `adapter_config.json`, `adapter_model.safetensors`: the adapter in PEFT format; those of two experts are in the
  subfolders `high_noise/` and `low_noise/`.
- `optimizer.safetensors`: the moments of AdamW, by parameter.
- `adapter_ema.safetensors`: the averaged adapter, with `train.ema_decay`.
- `random-0.safetensors`, …: the states of the random generators of each process.
- `rollout-0.safetensors`, …: the stored latents of each process, with `rollout.policy: stale:K`.
- `state.json`: step, data position, skipped steps, weight of the KL term and package versions.
- `config.yaml`: the settings of the run.
- `manifest.json`: size and SHA-256 of all other files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from frostline.atomic_io import file_sha256, sync
from frostline.config import LoraSettings
from frostline.documents import parse_json
from frostline.errors import CheckpointError, ConfigError, DataError, DocumentError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The key in `state.json` for the experts with a LoRA; earlier versions, which only trained the low-noise expert, did
# not write it.
EXPERTS = "experts"
# The key in `state.json` for the digests of the base adapters' files.
BASE_ADAPTERS = "base_adapters"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.checkpoint-\d+\.[0-9a-f]{8}\.partial")
# Name of a complete checkpoint that is being replaced by another one of the same step.
_REPLACED = re.compile(r"\.(checkpoint-(\d+))\.[0-9a-f]{8}\.replaced")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, written after `step` optimizer steps."""

    path: Path
    step: int

    def verify(self) -> None:
        """Check every file against the manifest.

        Raises:
            CheckpointError: a file is missing, changed, or not listed.
        """
        manifest = self.path / MANIFEST
        try:
            content = parse_json(manifest.read_bytes())
            expected = {
                str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()
            }
            made_as = content["format"]
            present = {path.relative_to(self.path).as_posix() for path in _files(self.path)} - {MANIFEST}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is damaged: its {MANIFEST} cannot be read") from error
        if made_as != _FORMAT:
            raise CheckpointError(f"{self.path} has format {made_as!r}; this version reads format {_FORMAT}")
        if odd := sorted(present ^ expected.keys()):
            raise CheckpointError(
                f"{self.path} is damaged: {odd[0]} is {'not listed' if odd[0] in present else 'missing'}"
            )
        for name, (size, sha256) in expected.items():
            path = self.path / name
            try:
                intact = path.stat().st_size == size and file_sha256(path) == sha256
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if not intact:
                raise CheckpointError(f"{self.path} is damaged: the SHA-256 of {name} does not match")


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> Checkpoint:
    """Create `run/checkpoint-<step>`: `write` fills a hidden folder, which then gets a manifest and is renamed.

    A checkpoint of the same step is replaced, and stays valid until the new one is complete. Earlier checkpoints are
    never affected, even if the process is killed.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission …).
    """
    final = run / f"checkpoint-{step}"
    partial, replaced = _hidden(final, "partial"), _hidden(final, "replaced")
    try:
        partial.mkdir(parents=True)
        write(partial)
        _seal(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(run)
    except (OSError, SafetensorError, DataError) as error:
        with suppress(OSError):
            _settle_replaced(run)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        kept = latest(run)
        rest = f"the last complete checkpoint is {kept.path}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"{final} cannot be written: {reason}; {rest}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, step)


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run by step, not yet verified, including one that was being replaced if there is no
    other of its step.
    """
    if not run.is_dir():
        return []
    found: dict[str, Checkpoint] = {}
    for path in run.iterdir():
        if path.is_dir() and (match := _NAME.fullmatch(path.name)):
            found[path.name] = Checkpoint(path, int(match[1]))
        elif path.is_dir() and (match := _REPLACED.fullmatch(path.name)):
            found.setdefault(match[1], Checkpoint(path, int(match[2])))
    return sorted(found.values(), key=lambda checkpoint: checkpoint.step)


def latest(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint, not yet verified."""
    return next(reversed(find_checkpoints(run)), None)


def latest_intact(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies; log the damaged ones, which are not changed.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    found = find_checkpoints(run)
    reason = ""
    for checkpoint in reversed(found):
        try:
            checkpoint.verify()
        except CheckpointError as error:
            reason = str(error)
            log.warning("%s; using the checkpoint before it", reason)
            continue
        return checkpoint
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {run} is intact: {reason}")
    return None


def set_aside_after(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`, so that a run that resumes from `step` does not use them."""
    for checkpoint in find_checkpoints(run):
        if checkpoint.step > step:
            aside = run / f"set-aside-checkpoint-{checkpoint.step}-{uuid.uuid4().hex[:8]}"
            checkpoint.path.rename(aside)
            log.warning("%s is after step %d: renamed to %s", checkpoint.path, step, aside.name)


def rotate(run: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, and the remains of interrupted writes."""
    _settle_replaced(run)
    for path in run.iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    found = find_checkpoints(run)
    discard(found[: max(0, len(found) - limit)] if limit is not None else [])


def discard(checkpoints: Sequence[Checkpoint]) -> None:
    """Delete checkpoints; as soon as the first file is deleted, a checkpoint is no longer found."""
    doomed = []
    for checkpoint in checkpoints:
        doomed.append(_hidden(checkpoint.path.with_name(f"checkpoint-{checkpoint.step}"), "partial"))
        checkpoint.path.rename(doomed[-1])
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of `state.json` of a verified checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = parse_json((checkpoint.path / "state.json").read_bytes())
    except (OSError, DocumentError) as error:
        raise _damaged(checkpoint) from error
    if not isinstance(state, dict):
        raise _damaged(checkpoint)
    return state


def samples_dealt(checkpoint: Checkpoint) -> int:
    """Return the number of samples that all processes had used, from a verified checkpoint.

    Raises:
        CheckpointError: its state cannot be read.
    """
    try:
        return int(read_state(checkpoint)["samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint) from error


def _damaged(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path} is damaged: its state.json cannot be read")


def check_same_experts(checkpoint: Checkpoint, lora: LoraSettings) -> None:
    """Check that the LoRA of a verified checkpoint belongs to the experts in the settings.

    The files of an adapter do not contain this information.

    Raises:
        ConfigError: it belongs to another expert.
        CheckpointError: the state cannot be read.
    """
    saved = read_state(checkpoint).get(EXPERTS, "low")
    if saved != lora.experts:
        raise ConfigError(
            f"lora.experts: the LoRA in {checkpoint.path} belongs to {saved}, not {lora.experts}; "
            "the experts of a run cannot be changed"
        )


def _hidden(path: Path, why: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{why}")


def _settle_replaced(run: Path) -> None:
    """Restore the name of a checkpoint that was being replaced, or delete it if the new one exists."""
    for path in run.iterdir():
        match = _REPLACED.fullmatch(path.name)
        if match and (run / match[1]).exists():
            shutil.rmtree(path, ignore_errors=True)
        elif match:
            path.rename(run / match[1])


def _seal(folder: Path) -> None:
    files = sorted(_files(folder))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": entries}, indent=2) + "\n")
    inner = sorted({path.parent for path in files} - {folder})
    for path in (*files, folder / MANIFEST, *inner, folder):
        sync(path)


def _files(folder: Path) -> list[Path]:
    """Return all files and links in the folder and its subfolders."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
