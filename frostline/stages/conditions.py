"""The frozen inputs of a denoiser, as a model family describes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

# Who describes conditions imports this file: what it imports is part of what identifies their cached values.
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConditionInputs:
    """What B samples give to the denoiser.

    sample_id: names for logs. prompts: B strings. first_frame: (B, 3, H, W) in [0, 1], on the CPU. num_frames: of the
    videos to generate.
    """

    sample_id: tuple[str, ...]
    prompts: tuple[str, ...]
    first_frame: Tensor
    num_frames: int


@dataclass(frozen=True)
class Condition:
    """What is computed frozen of B samples, once for each, and then cached: an input of the denoiser, for instance.

    name: of the tensor, or of the result where that is several. stages: that compute it. keys: content key of each row.
    compute: takes indices of rows, returns the tensors by name, with one row for each.
    """

    name: str
    stages: tuple[str, ...]
    keys: tuple[str, ...]
    compute: Callable[[list[int]], dict[str, Tensor]]
