"""Cache of each sample's latents before the first live step, reused for a limited number of optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError


class StaleLatents:
    """Reuses the latents of a sample for a number of optimizer steps, then computes them again.

    Args:
        max_age: maximum number of optimizer steps for which latents are reused.

    Attributes:
        step: completed optimizer steps; the training loop must increment it.
    """

    def __init__(self, max_age: int) -> None:
        self.max_age = max_age
        self.step = 0
        self._kept: dict[str, tuple[int, Tensor]] = {}
        self._seen: tuple[int, int] | None = None

    def check_counted(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise if the trained parameters changed since the last call, but `step` did not.

        Raises:
            ConfigError: optimizer steps are not counted, so that latents would never be too old.
        """
        now = self.step, sum(parameter._version for parameter in parameters)
        before, self._seen = self._seen, now
        if before is not None and before[0] == now[0] and before[1] != now[1]:
            raise ConfigError(
                "rollout.policy: stale:K needs the number of optimizer steps: add 1 to "
                "module.parts.stale.step after each step, as the trainer does"
            )

    def reuse(self, keys: Sequence[str], compute: Callable[[list[int]], Tensor], device: torch.device) -> Tensor:
        """Return the latents of a batch, (B, C, F, h, w).

        Args:
            keys: content key, for each row, of what the latents depend on besides the weights.
            compute: maps row indices to their latents with the current weights.
        """
        self._kept = {key: kept for key, kept in self._kept.items() if self.step - kept[0] <= self.max_age}
        missing = list({key: row for row, key in enumerate(keys) if key not in self._kept}.values())
        if missing:
            for row, latents in zip(missing, compute(missing), strict=True):
                self._kept[keys[row]] = self.step, latents.detach().to("cpu", copy=True)
        return torch.stack([self._kept[key][1].to(device) for key in keys])

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored latents, by `step/key`."""
        return {f"{step}/{key}": latents for key, (step, latents) in self._kept.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Restore the result of `tensors`, and the number of optimizer steps."""
        named = ((name.partition("/"), latents) for name, latents in tensors.items())
        self._kept = {key: (int(at), latents) for (at, _, key), latents in named}
        self.step = step
