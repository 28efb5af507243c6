"""Small cache files in the user's cache folder: digests of weights, latencies of engines.

Their content is trusted, so each is signed with the user's key. A file that was altered, or that another user signed,
is ignored.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from frostline.atomic_io import atomic_write
from frostline.errors import FrostlineError
from frostline.paths import open_regular
from frostline.runtime.engines import signing

log = logging.getLogger(__name__)

CACHE_VARIABLE = "FROSTLINE_CACHE_DIR"
_MAX_BYTES = 2**20


def cache_folder() -> Path:
    """Return `FROSTLINE_CACHE_DIR`, or the user's cache folder of the platform."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    import platformdirs  # only this default needs it

    return platformdirs.user_cache_path("frostline")


def recall(note: Path) -> str | None:
    """Return the text of a note; None if there is no note of this name with this user's signature."""
    try:
        with open_regular(note) as file:
            text, _, signature = file.read(_MAX_BYTES).decode().rstrip("\n").rpartition("\n")
        return text if signing.verify(_signed(note, text), signature) else None
    except (OSError, UnicodeDecodeError, FrostlineError) as error:
        log.debug("note %s: %s", note, error)
        return None


def remember(note: Path, text: str, *, keep: bool = False) -> None:
    """Write a note, whole or not at all; where that is not possible, the next run computes it again.

    Args:
        keep: a note that another process wrote meanwhile stays.
    """
    try:
        with atomic_write(note) as part:
            part.write_text(f"{text}\n{signing.sign(_signed(note, text))}\n")
            if keep:
                # Fails where the note is there by now; else both are the same file, and to rename it changes nothing.
                os.link(part, note)
    except FrostlineError as error:
        if not (keep and note.is_file()):
            log.debug("%s", error)


def _signed(note: Path, text: str) -> bytes:
    """Return the signed bytes: text and name of the note, so that no note can be passed off as another."""
    return f"frostline note {note.parent.name}/{note.name}\n{text}".encode()
