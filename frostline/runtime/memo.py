"""Small notes in the user's own folder for what can be computed again: digests of weights, latencies of engines."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from frostline.errors import DataError
from frostline.writing import written_whole

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
    try:
        with written_whole(note) as part:
            part.write_text(text + "\n")
            if keep:
                # Fails where the note is there by now; else both are the same file, and to rename it changes nothing.
                os.link(part, note)
    except DataError as error:
        if not (keep and note.is_file()):
            log.debug("%s", error)
