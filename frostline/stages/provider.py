"""What brings stages, what hands them out, and how often a step uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

# Settings of rewards import this file, and settings must be read without torch.
if TYPE_CHECKING:
    from frostline.runtime.stage import Runner, Stage
    from frostline.stages.shapes import ShapeRange

Phase = Literal["conditioning", "rollout", "tail", "decode", "reward"]


class StageProvider(Protocol):
    """Has networks, and says which frozen computations they are used for: a video model, or a reward."""

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages, whose engines serve the range of shapes."""
        ...


class Stages(Protocol):
    """Frozen stages by name, each on the backend that serves it: a `Runtime`."""

    def __getitem__(self, stage: str) -> Runner: ...


@dataclass(frozen=True)
class Use:
    """A use of a stage in a training step.

    stage: its name. live: whether a gradient flows through it. count: how many times a step uses it so.
    phase: of the step.
    """

    stage: str
    live: bool
    count: int
    phase: Phase
