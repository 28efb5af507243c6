"""What became of one stage on one backend in an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frostline.runtime.manifest import Manifest

Status = Literal["built", "present", "planned", "failed"]


@dataclass(frozen=True)
class ExportRow:
    """What became of one stage on one backend. `note` says why it failed, or was not verified."""

    stage: str
    backend: str
    status: Status
    seconds: float
    manifest: Manifest | None = None
    note: str = ""
