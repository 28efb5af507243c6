"""Frozen inputs of a denoiser, as a model family declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

# Modules that declare conditions import this file, so its own imports are part of the cache key of the conditions.
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConditionInputs:
    """The prompts and first frames of B samples, from which the conditions of the denoiser are computed.

    Attributes:
        sample_id: names for log messages.
        prompts: B strings.
        first_frame: (B, 3, H, W) in [0, 1], on the CPU.
        num_frames: number of frames of the videos to generate.
    """

    sample_id: tuple[str, ...]
    prompts: tuple[str, ...]
    first_frame: Tensor
    num_frames: int


@dataclass(frozen=True)
class Condition:
    """A frozen, cached result for each of B samples, such as an input of the denoiser.

    Attributes:
        name: name of the tensor, or of the result if it has several tensors.
        stages: names of the stages that compute it.
        keys: content key of each row.
        compute: takes indices of rows; returns the tensors by name, with one row for each index.
    """

    name: str
    stages: tuple[str, ...]
    keys: tuple[str, ...]
    compute: Callable[[list[int]], dict[str, Tensor]]
