"""Which Euler steps of a training step carry gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from frostline.config import BackpropStrategy, LoraSettings
from frostline.errors import ConfigError
from frostline.experts import Experts
from frostline.models.schedule import FlowMatchSchedule


class BackpropOptions(Protocol):
    """What the settings say of the steps with gradient; see `frostline.train.settings.BackpropSettings`."""

    @property
    def strategy(self) -> BackpropStrategy: ...
    @property
    def num_steps(self) -> int | None: ...
    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def lv_samples(self) -> int: ...
    @property
    def kl_terms(self) -> int | None: ...
    @property
    def stop_latent_gradient(self) -> bool: ...


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
    @property
    def backprop(self) -> BackpropOptions: ...
    @property
    def sft_weight(self) -> float: ...
    @property
    def lora(self) -> LoraSettings: ...


@dataclass(frozen=True)
class DenoiseSteps:
    """The steps of one denoising trajectory, and which of them may be live, that is, carry gradient.

    start, end: first and last step that may be live; the steps after `end` are not computed.
    high_noise: number of leading steps that the high-noise expert serves; 0 where there is one expert.
    strategy: `tail` makes all of `start … end` live (the reference, arXiv 2510.14255), `last` only `end`, `random`
        draws `num_steps` of them for each training step, `uniform` takes `num_steps` at equal distances from a drawn
        offset, `steps` takes those listed. The names are VideoX-Fun's; `tail` and `last` are DRaFT-K and DRaFT-1
        (arXiv 2309.17400).
    lv_samples: how many more times the last step is computed live, on the generated clip with fresh noise (DRaFT-LV).
    kl_terms: number of live steps with a KL term, drawn for each training step; None means all of them.
    on_data: whether the denoiser is also live on the data's own clip, for the flow-matching loss.
    boundary: sigma below which the last expert serves; 1 where it is the only one.
    experts: those of two with a LoRA.
    stop_latent_gradient: whether live steps are given their latents without gradient, so that the gradient of the
        reward reaches each through the sum of the Euler steps alone.
    """

    start: int
    end: int
    high_noise: int = 0
    strategy: BackpropStrategy = "tail"
    num_steps: int = 0
    steps: tuple[int, ...] = ()
    experts: Experts = "low"
    stop_latent_gradient: bool = False
    lv_samples: int = 0
    kl_terms: int | None = None
    on_data: bool = False
    boundary: float = 1.0

    @classmethod
    def of(cls, settings: StepSettings, boundary: float, two_experts: bool) -> Self:
        """Return those of a training step.

        Args:
            boundary: the model's own, which the settings may override.
        Raises:
            ConfigError: the model has one expert, and `lora.experts` names another.
        """
        settings.lora.check_experts(two_experts)
        schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
        boundary = boundary if settings.boundary is None else settings.boundary
        high_noise = schedule.high_noise_steps(boundary) if two_experts else 0
        backprop = settings.backprop
        return cls(
            settings.grad_start_step,
            settings.grad_end_step,
            high_noise,
            backprop.strategy,
            backprop.num_steps or 0,
            backprop.steps,
            settings.lora.experts,
            backprop.stop_latent_gradient,
            backprop.lv_samples,
            backprop.kl_terms,
            settings.sft_weight > 0,
            boundary if two_experts else 1.0,
        )

    def draw(self) -> tuple[int, ...]:
        """Return the live steps of one training step, ascending; the random ones from torch's generator of the CPU.

        Steps of an expert without LoRA may be among them: see `with_graph`; their KL term is zero.
        """
        if self.strategy == "random":
            return self._at(torch.randperm(len(self._window))[: self.num_steps].sort().values.tolist())
        if self.strategy == "uniform":
            return self._spaced(torch.rand((), dtype=torch.float64).item())
        return self._fixed

    @property
    def may_be_live(self) -> tuple[int, ...]:
        """The steps that are live in some draw."""
        return self._window if self.drawn else self._fixed

    @property
    def most_live(self) -> tuple[int, ...]:
        """The live steps of the draw that keeps most for backward."""
        if not self.drawn:
            return self._fixed
        return self._window[: self.num_steps] if self.experts == "high" else self._window[-self.num_steps :]

    @property
    def live_with_lora(self) -> int:
        """How many live steps, at most, a denoiser with a LoRA serves."""
        return len(self.with_lora(self.most_live))

    def with_lora(self, live: Sequence[int]) -> tuple[int, ...]:
        """Return those of the live steps that a denoiser with a LoRA serves."""
        return tuple(step for step in live if self._has_lora(step))

    def with_graph(self, live: Sequence[int]) -> tuple[int, ...]:
        """Return those of the live steps that keep activations for backward, ascending.

        They have a LoRA, or are behind a step that has one, and pass its gradient on through their latents.
        """
        adapted = self.with_lora(live)
        if not adapted or self.stop_latent_gradient:
            return adapted
        return tuple(step for step in live if step >= adapted[0])

    @property
    def live_uses(self) -> int:
        """How often, at most, denoisers run live: each time they keep activations for backward."""
        return len(self.with_graph(self.most_live)) + self.lv_samples + self.on_data

    @property
    def kl_uses(self) -> int:
        """How many live steps, at most, are compared with the model without LoRA."""
        return self.live_with_lora if self.kl_terms is None else min(self.kl_terms, self.live_with_lora)

    @property
    def clips(self) -> int:
        """How many clips are decoded and rewarded for each sample."""
        return 1 + self.lv_samples

    def check_live(self) -> None:
        """Refuse steps that may train nothing, or never one of the two experts that have a LoRA.

        Raises:
            ConfigError: no live step has a LoRA, or in some draw none has; or no step of one expert is ever live; or
                the last step is to be repeated, and has no LoRA.
        """
        if self.lv_samples and not self._has_lora(self.end):
            raise ConfigError(
                f"backprop.lv_samples: the last step, {self.end}, is that of an expert without LoRA: lora.experts is "
                f"{self.experts}"
            )
        if self.experts == "both":
            self._check_both()
        elif self.experts == "high" and self._latest_first() >= self.high_noise:
            before = "a step with gradient has to be before these"
            drawn = f"a draw of {self.num_steps} steps up to grad_end_step {self.end} may be among these alone"
            raise ConfigError(
                f"grad_start_step {self.start}: the low-noise expert, which has no LoRA, serves the steps from "
                f"{self.high_noise} on; {drawn if self.drawn else before}"
            )
        elif self.experts == "low" and self._earliest_last() < self.high_noise:
            beyond = "a step with gradient has to be beyond them"
            drawn = f"a draw of {self.num_steps} steps from grad_start_step {self.start} on may be among these alone"
            raise ConfigError(
                f"grad_end_step {self.end}: the high-noise expert, which has no LoRA, serves the first "
                f"{self.high_noise} steps; {drawn if self.drawn else beyond}"
            )

    def _check_both(self) -> None:
        by_high = [step < self.high_noise for step in self.may_be_live]
        for expert, served in (("high", any(by_high)), ("low", not all(by_high))):
            if not served:
                steps = f"the first {self.high_noise}" if expert == "high" else f"those from {self.high_noise} on"
                raise ConfigError(
                    f"lora.experts: both: no step with gradient is one of the {expert}-noise expert, whose LoRA would "
                    f"not be trained: it serves {steps}, and the steps with gradient are "
                    f"{', '.join(map(str, self.may_be_live))}"
                )

    def _has_lora(self, step: int) -> bool:
        return self.experts in ("high" if step < self.high_noise else "low", "both")

    def _earliest_last(self) -> int:
        """The last live step of the draw that ends first."""
        if not self.drawn:
            return self._fixed[-1]
        return self._window[self.num_steps - 1] if self.strategy == "random" else self._spaced(0.0)[-1]

    def _latest_first(self) -> int:
        """The first live step of the draw that begins last."""
        if not self.drawn:
            return self._fixed[0]
        first = -self.num_steps if self.strategy == "random" else math.ceil(len(self._window) / self.num_steps) - 1
        return self._window[first]

    @property
    def drawn(self) -> bool:
        """Whether the live steps differ from one training step to another."""
        return self.strategy in ("random", "uniform")

    @property
    def _window(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.end + 1))

    @property
    def _fixed(self) -> tuple[int, ...]:
        """The live steps of a strategy that draws none."""
        if self.strategy == "steps":
            return self.steps
        return (self.end,) if self.strategy == "last" else self._window

    def _at(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._window[place] for place in places)

    def _spaced(self, offset: float) -> tuple[int, ...]:
        """At equal distances; `offset` in [0, 1) of a distance."""
        distance = len(self._window) / self.num_steps
        return self._at([int((offset + number) * distance) for number in range(self.num_steps)])
