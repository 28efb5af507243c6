"""Small notes in the user's own folder for what can be computed again: digests of weights, latencies of engines."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

CACHE_VARIABLE = "FROSTLINE_CACHE_DIR"


def cache_folder() -> Path:
    """`FROSTLINE_CACHE_DIR`, or the user's own folder for what can be computed again."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    import platformdirs  # only this default needs it

    return platformdirs.user_cache_path("frostline")


def recall(note: Path) -> str | None:
    """The text of a note, or None where there is none that can be read."""
    try:
        return note.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def remember(note: Path, text: str, *, keep: bool = False) -> None:
    """Write a note, whole or not at all; where that is not possible, the next run computes it again.

    Args:
        keep: a note that another process wrote meanwhile stays.
    """
    partial = note.with_suffix(f".{os.getpid()}.partial")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n")
        if keep:
            with suppress(FileExistsError):
                os.link(partial, note)
            partial.unlink()
        else:
            partial.replace(note)
    except OSError as error:
        log.debug("cannot write the note %s: %s", note, error)
