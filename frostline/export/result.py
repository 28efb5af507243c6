"""The result of one stage on one backend in an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.tolerance import Tolerance

Status = Literal["built", "present", "planned", "failed"]


@dataclass(frozen=True)
class ExportRow:
    """The result of one stage on one backend.

    Attributes:
        note: why it failed or was not verified, or how its range of shapes was limited.
        bounds: the tolerance of its engine.
    """

    stage: str
    backend: str
    status: Status
    seconds: float
    manifest: Manifest | None = None
    note: str = ""
    bounds: Tolerance | None = None
