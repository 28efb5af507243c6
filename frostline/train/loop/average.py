"""The exponential moving average of the LoRA matrices over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AdapterAverage:
    """Tracks the trained matrices: `average = d average + (1 - d) matrix` after each update.

    `d` is `min(decay, (1 + n) / (10 + n))` in the n-th update, n = 1, 2, …, so that the initial matrices soon have
    little weight. (In its n-th update, diffusers' `EMAModel` uses the formula with n - 1, and 0 in the first.)

    Args:
        decay: in (0, 1).
        parameters: the matrices by name, before the first update.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay = decay
        self.updates = 0
        self._average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Update the average after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self._average.items():
            average.lerp_(parameters[name].detach(), 1 - decay)

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Replace the values of the matrices by the average within the block, also for engines, which read their
        memory.
        """
        trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _copy(self._average, parameters)
        try:
            yield
        finally:
            _copy(trained, parameters)

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by the names of the matrices."""
        return {name: average.cpu().contiguous() for name, average in self._average.items()}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore the result of `tensors` and the number of updates.

        Raises:
            ValueError: the tensors belong to other matrices.
        """
        shapes = {name: average.shape for name, average in self._average.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ValueError("the averaged adapter does not match the model")
        self.updates = updates
        for name, average in self._average.items():
            average.copy_(tensors[name])


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
