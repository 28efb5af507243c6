"""Reward-feedback training: `WanTrainingModule` computes a step, `trainer.train` runs many."""

from frostline.train.module import WanTrainingModule

__all__ = ["WanTrainingModule"]
