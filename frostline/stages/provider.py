"""Protocols for objects that have stages and objects that run them, and the uses of stages in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

# The settings of rewards import this file, and reading settings must not import torch.
if TYPE_CHECKING:
    from frostline.runtime.stage import Runner, Stage
    from frostline.stages.shapes import ShapeRange

Phase = Literal["conditioning", "rollout", "tail", "decode", "reward"]


class StageProvider(Protocol):
    """An object with networks that run as frozen stages: a video model, or a reward."""

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages; their engines support the given range of shapes."""
        ...


class Stages(Protocol):
    """Frozen stages by name, each on its planned backend; a `Runtime` implements this."""

    def __getitem__(self, stage: str) -> Runner: ...


@dataclass(frozen=True)
class Use:
    """A use of a stage in a training step.

    Attributes:
        stage: name of the stage.
        live: whether a gradient flows through it.
        count: number of such uses in a step.
        phase: phase of the step.
    """

    stage: str
    live: bool
    count: int
    phase: Phase
