"""Reward-feedback training: `TrainingModule` computes a step, `trainer.train` runs many.

`WanTrainingModule` is its name in programs that train Wan.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frostline.train.step.module import TrainingModule
    from frostline.train.step.module import TrainingModule as WanTrainingModule

__all__ = ["TrainingModule", "WanTrainingModule"]


def __getattr__(name: str) -> Any:
    # Once asked for: it brings torch, which takes seconds, and the settings beside it need none.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from frostline.train.step.module import TrainingModule

    return TrainingModule
