"""Reward-feedback training: `WanTrainingModule` computes a step, `trainer.train` runs many."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frostline.train.step.module import WanTrainingModule

__all__ = ["WanTrainingModule"]


def __getattr__(name: str) -> Any:
    # Once asked for: it brings torch, which takes seconds, and the settings beside it need none.
    if name != "WanTrainingModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from frostline.train.step.module import WanTrainingModule

    return WanTrainingModule
