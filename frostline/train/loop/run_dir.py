"""Lock the folder of a training run, read its facts, and read and write its files of JSON lines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from frostline.atomic_io import atomic_write
from frostline.documents import finite_values, parse_json
from frostline.errors import CheckpointError, DataError, DocumentError

log = logging.getLogger(__name__)

METRICS, VALIDATION, RUN_FACTS, CONFIG = "metrics.jsonl", "validation.jsonl", "run.json", "config.yaml"
REPORT, SHEET, TIMING, LOG = "report.html", "contact_sheet.png", "timing.json", "frostline.log"
ADAPTER, ADAPTER_EMA, CLIPS, TRACKERS = "adapter", "adapter_ema", "validation", "trackers"
# Keys in `run.json` that identify a run of frostline, and the checkpoint that the run started from.
PROGRAM, BEGAN_FROM = "frostline", "began_from"
# Key in `run.json` for the folder that relative paths in the settings refer to.
WORKING_DIR = "working_dir"
# Key in `run.json` for the sessions of the run; each resume adds one.
SESSIONS = "sessions"
# The value of `--resume` for the newest complete checkpoint.
LATEST = "latest"
_LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs within the block, and create it if necessary.

    Raises:
        CheckpointError: another run is using it, or it is not writable.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{folder}: another run is writing to it; wait for it to finish, or choose another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder}: cannot be written to: {reason}") from error
    try:
        yield
    finally:
        lock.release()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`; empty if the file is missing or damaged."""
    try:
        facts = parse_json((folder / RUN_FACTS).read_bytes())
    except (OSError, DocumentError):
        return {}
    return facts if isinstance(facts, dict) else {}


def await_release(folder: Path, seconds: float) -> None:
    """Wait until no process writes to the run, at most this many seconds: a killed process needs a moment to exit."""
    if folder.is_dir():
        with suppress(Timeout, OSError, NotImplementedError), FileLock(folder / _LOCK).acquire(timeout=seconds):
            pass


def check_is_run(folder: Path) -> None:
    """Check that the folder contains a run to report on.

    Raises:
        DataError: it does not; the message states what is missing.
    """
    if not folder.is_dir():
        found = "not a folder" if folder.exists() else "no such folder"
    elif (folder / METRICS).is_file() or (folder / VALIDATION).is_file():
        return
    elif (folder / RUN_FACTS).is_file():
        found = f"the run there has not finished its first step (no {METRICS})"
    else:
        found = f"not a run folder (no {METRICS})"
    raise DataError(f"{folder}: {found}: give the output_dir of a training run")


class JsonLines:
    """A file with one JSON object per line; non-finite numbers become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one complete line.

        Raises:
            CheckpointError: the line cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_values(line)) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Flush all lines to disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def keep_until(self, step: int, source: Path | None = None) -> None:
        """Keep the lines (or those of `source`) up to a step; later ones were not saved and will be written again."""
        lines = read_lines(source or self.path)
        kept = [line for line in lines if isinstance(number := line.get("step", 0), int) and number <= step]
        if not kept and not self.path.exists():
            return
        with atomic_write(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines; a killed process may have left an incomplete one at the end."""
    if not path.is_file():
        return []
    lines = []
    # Not `splitlines`: a sample's name may contain other characters that it treats as line ends.
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = parse_json(text)
            except ValueError:
                log.debug("%s: skipped an incomplete line", path)
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines
