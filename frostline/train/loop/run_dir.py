"""The folder of a training run: one run at a time, lines of JSON that end where a checkpoint does."""

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
from frostline.errors import CheckpointError, DataError

log = logging.getLogger(__name__)

METRICS, VALIDATION, RUN_FACTS, CONFIG = "metrics.jsonl", "validation.jsonl", "run.json", "config.yaml"
REPORT, SHEET, TIMING, LOG = "report.html", "contact_sheet.png", "timing.json", "frostline.log"
ADAPTER, ADAPTER_EMA, CLIPS, TRACKERS = "adapter", "adapter_ema", "validation", "trackers"
# By these names `run.json` says whose it is, and from which checkpoint of another folder the run began.
PROGRAM, BEGAN_FROM = "frostline", "began_from"
# In `run.json`: to what relative paths in the settings are relative.
WORKING_DIR = "working_dir"
# The value of `--resume` that means the newest checkpoint that is whole.
LATEST = "latest"
_LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other run may write to the folder, which is made if need be.

    Raises:
        CheckpointError: another run is in it, or it cannot be written to.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{folder}: another run is writing there; wait for it, or choose another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder}: cannot be written to: {reason}") from error
    try:
        yield
    finally:
        lock.release()


def await_release(folder: Path, seconds: float) -> None:
    """Wait until no run writes to the folder, so many seconds at most: one that was killed takes a moment to go."""
    if folder.is_dir():
        with suppress(Timeout, OSError, NotImplementedError), FileLock(folder / _LOCK).acquire(timeout=seconds):
            pass


def check_is_run(folder: Path) -> None:
    """Look whether there is something to report of a run.

    Raises:
        DataError: says what is missing.
    """
    if not folder.is_dir():
        found = "not a folder" if folder.exists() else "no such folder"
    elif (folder / METRICS).is_file() or (folder / VALIDATION).is_file():
        return
    elif (folder / RUN_FACTS).is_file():
        found = f"the run there has not finished its first step (no {METRICS})"
    else:
        found = f"not the folder of a run (no {METRICS})"
    raise DataError(f"{folder}: {found}: name the output_dir of a training run")


class JsonLines:
    """A file of one JSON object a line; what is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, whole.

        Raises:
            CheckpointError: the disk does not take it.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_values(line)) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Make sure that the disk has all lines."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def keep_until(self, step: int, source: Path | None = None) -> None:
        """Keep the lines (or those of `source`) up to a step: the rest was not saved, and will come again."""
        lines = read_lines(source or self.path)
        kept = [line for line in lines if isinstance(number := line.get("step", 0), int) and number <= step]
        if not kept and not self.path.exists():
            return
        with atomic_write(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a killed writer may have left a piece of one at the end."""
    if not path.is_file():
        return []
    lines = []
    # Not `splitlines`: a sample's name may hold one of the many other characters that it takes for the end of a line.
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = parse_json(text)
            except ValueError:
                log.debug("%s: a broken line is left out", path)
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines
