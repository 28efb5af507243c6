"""The flow-matching schedule and its Euler step, as used by Wan (`FlowMatchScheduler` of diffsynth)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from frostline.errors import ConfigError

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class FlowMatchSchedule:
    """`u_i = 1 - i/N`, `sigma_i = s u_i / (1 + (s - 1) u_i)`, `t_i = 1000 sigma_i` for i = 0…N.

    N is `num_inference_steps`, and s is `shift`.

    Raises:
        ConfigError: there is less than one step, or the shift is not positive and finite.
    """

    num_inference_steps: int = 8
    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, not {self.num_inference_steps}")
        if not 0 < self.shift < math.inf:
            raise ConfigError(f"shift must be positive and finite, not {self.shift}")

    @cached_property
    def sigmas(self) -> Tensor:
        """Return (N + 1,) float64 sigmas, from 1 down to 0."""
        u = 1 - torch.arange(self.num_inference_steps + 1, dtype=torch.float64) / self.num_inference_steps
        return self._shifted(u)

    def drawn_sigma(self, lowest: float = 0.0, highest: float = 1.0) -> float:
        """Return a random sigma in [lowest, highest) whose u is uniform, from torch's CPU generator.

        Args:
            lowest, highest: in [0, 1].
        """
        first, last = (sigma / (self.shift - (self.shift - 1) * sigma) for sigma in (lowest, highest))
        return self._shifted(first + (last - first) * torch.rand((), dtype=torch.float64)).item()

    @cached_property
    def timesteps(self) -> Tensor:
        """Return (N + 1,) float64 timesteps, from 1000 down to 0."""
        return TRAIN_TIMESTEPS * self.sigmas

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """Compute `x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v(x_i, t_i)`, where `index` is i in [0, N)."""
        return latents + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity

    def high_noise_steps(self, boundary: float) -> int:
        """Return the number of leading steps for the high-noise expert: those with `t_i >= boundary * 1000`."""
        return int((self.sigmas[:-1] >= boundary).sum())

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)
