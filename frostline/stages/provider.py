"""What brings stages, and what hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

# Rewards import this file, and settings must be read without torch.
if TYPE_CHECKING:
    from frostline.runtime.stage import Runner, Stage
    from frostline.stages.shapes import ShapeRange


class StageProvider(Protocol):
    """Brings stages: a reward its networks."""

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages; `shapes` is the range that their engines serve."""
        ...


class Stages(Protocol):
    """Hands out stages by name, each on whichever backend the plan names; a `Runtime` does."""

    def __getitem__(self, stage: str) -> Runner: ...
