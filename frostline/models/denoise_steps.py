"""Which Euler steps of a training step are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from frostline.errors import ConfigError
from frostline.models.schedule import FlowMatchSchedule


class StepSettings(Protocol):
    """What the settings of a training step say of its Euler steps; see `frostline.train.settings`."""

    @property
    def num_inference_steps(self) -> int: ...
    @property
    def grad_start_step(self) -> int: ...
    @property
    def grad_end_step(self) -> int: ...
    @property
    def shift(self) -> float: ...
    @property
    def boundary(self) -> float | None: ...


@dataclass(frozen=True)
class DenoiseSteps:
    """Steps `0 … mid - 1` are the rollout head, `mid … final` the denoise tail.

    high_noise: so many leading steps are the high-noise expert's, which carries no LoRA; 0 where there is one expert.
    """

    mid: int
    final: int
    high_noise: int = 0

    @classmethod
    def of(cls, settings: StepSettings, boundary: float, two_experts: bool) -> Self:
        """Those of a training step.

        Args:
            boundary: the model's own, which the settings may override.
        """
        schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
        boundary = boundary if settings.boundary is None else settings.boundary
        high_noise = schedule.high_noise_steps(boundary) if two_experts else 0
        return cls(settings.grad_start_step, settings.grad_end_step, high_noise)

    def check_tail(self) -> None:
        """Refuse a tail that trains nothing.

        Raises:
            ConfigError: no step of it has a LoRA.
        """
        if not self.tail_with_lora:
            raise ConfigError(
                f"grad_end_step {self.final}: the high-noise expert, which has no LoRA, serves the first "
                f"{self.high_noise} steps; the tail has to reach beyond them"
            )

    @property
    def tail_with_lora(self) -> int:
        """How many steps of the tail the denoiser with the LoRA serves: they alone keep activations for backward."""
        return max(0, self.final + 1 - max(self.mid, self.high_noise))
