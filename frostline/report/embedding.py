"""Embed files in a page as data URIs."""

from __future__ import annotations

import base64
from pathlib import Path

from frostline.errors import DataError


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read for the report: {error.strerror or error}") from error


def data_uri(data: bytes, media_type: str) -> str:
    """Return the data as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
