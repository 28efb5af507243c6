"""Read the YAML front matter of a model card, the README.md next to weights on a model hub."""

from __future__ import annotations

from pathlib import Path

from frostline.documents import parse_yaml
from frostline.errors import DocumentError

_LARGEST = 2**20


def stated_license(weights: Path) -> str | None:
    """Return the licence in the model card of a weights file, an identifier such as `apache-2.0`.

    The card is searched for in the file's folder and in its parent folder, because a weights file may be in a subfolder
    of the model.
    Returns None if the card cannot be read or states no licence: the weights are usable without one.
    """
    for folder in (weights.parent, weights.parent.parent):
        card = folder / "README.md"
        if card.is_file() and card.stat().st_size <= _LARGEST:
            return _license(card)
    return None


def _license(card: Path) -> str | None:
    try:
        start, *rest = card.read_text("utf-8", errors="replace").split("\n---", 1)
    except OSError:
        return None
    if not start.startswith("---\n") or not rest:
        return None
    try:
        front_matter = parse_yaml(start.removeprefix("---\n"))
    except DocumentError:
        return None
    stated = front_matter.get("license") if isinstance(front_matter, dict) else None
    return stated if isinstance(stated, str) else None
