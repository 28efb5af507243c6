"""Small cache files in the user's cache folder: digests of weights, latencies of engines.

Their content is trusted, so each file is signed with the user's key. A file that was changed, or that another user
signed, is ignored.
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
    """Return `FROSTLINE_CACHE_DIR`, or the platform's cache folder of the user."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    import platformdirs  # imported only for this default

    return platformdirs.user_cache_path("frostline")


def recall(note: Path) -> str | None:
    """Return the text of a cache file; None if it does not exist, or this user has not signed it for this name."""
    try:
        with open_regular(note) as file:
            text, _, signature = file.read(_MAX_BYTES).decode().rstrip("\n").rpartition("\n")
        return text if signing.verify(_signed(note, text), signature) else None
    except (OSError, UnicodeDecodeError, FrostlineError) as error:
        log.debug("cache file %s: %s", note, error)
        return None


def remember(note: Path, text: str, *, keep: bool = False) -> None:
    """Write a cache file atomically; if this fails, the next run computes the value again.

    Args:
        note: path of the file.
        text: content of the file, without the signature.
        keep: keep a file that another process wrote in the meantime.
    """
    try:
        with atomic_write(note) as part:
            part.write_text(f"{text}\n{signing.sign(_signed(note, text))}\n")
            if keep:
                # Fails if the file exists by now; otherwise both names are the same file, and the rename has no effect.
                os.link(part, note)
    except FrostlineError as error:
        if not (keep and note.is_file()):
            log.debug("%s", error)


def _signed(note: Path, text: str) -> bytes:
    """Return the bytes to sign: text and name of the file, so that no file can be used in place of another."""
    return f"frostline note {note.parent.name}/{note.name}\n{text}".encode()
