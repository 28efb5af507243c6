"""Reward-feedback training: `TrainingModule` computes a step, `trainer.train` runs the loop.

`WanTrainingModule` is an alias for programs that train Wan.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frostline.train.step.module import TrainingModule
    from frostline.train.step.module import TrainingModule as WanTrainingModule

__all__ = ["TrainingModule", "WanTrainingModule"]


def __getattr__(name: str) -> Any:
    # Imported on access: it imports torch, which takes seconds and which the settings do not need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from frostline.train.step.module import TrainingModule

    return TrainingModule
