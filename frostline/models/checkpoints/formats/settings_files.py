"""JSON settings next to weights, or inside weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frostline import documents
from frostline.errors import ConfigError, DocumentError


def read_json(path: Path) -> dict[str, Any]:
    """Return a mapping of settings; empty if the file does not exist.

    Raises:
        ConfigError: the file is not a JSON mapping.
    """
    if not path.is_file():
        return {}
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a mapping of settings; `where` names its source in messages.

    Raises:
        ConfigError: the text is not a JSON mapping.
    """
    try:
        content = documents.parse_json(text)
    except DocumentError as error:
        raise ConfigError(f"{where} {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping of settings")
    return content
