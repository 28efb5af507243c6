"""Griffe extension: docstring sections (`Args:`, `Raises:`, …) need no blank line before them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"\n(?=(?:Args|Attributes|Returns|Raises|Yields):\n)")


class DocstringSections(Extension):
    """Insert the blank line that griffe expects before each section."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Insert the blank lines into the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
