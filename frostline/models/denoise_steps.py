"""Select the Euler steps of a training step that have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from frostline.config import BackpropStrategy, LoraSettings
from frostline.errors import ConfigError
from frostline.experts import Experts
from frostline.models.schedule import FlowMatchSchedule


class BackpropOptions(Protocol):
    """Settings of the steps with a gradient; see `frostline.train.step_settings.BackpropSettings`."""

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
    """Settings of a training step that affect its Euler steps; see `frostline.train.step_settings`."""

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
    """The steps of one denoising trajectory, and those that may be live, that is, have a gradient.

    Attributes:
        start, end: first and last step that may be live; the steps after `end` are not computed.
        high_noise: number of leading steps of the high-noise expert; 0 for a model with one expert.
        strategy: `tail`: all steps from `start` to `end` are live (the reference, arXiv 2510.14255); `last`: only
            `end`; `random`: `num_steps` random steps in each training step; `uniform`: `num_steps` steps at equal
            distances from a random offset; `steps`: the listed steps. The names are VideoX-Fun's; `tail` and `last` are
            DRaFT-K and DRaFT-1 (arXiv 2309.17400).
        lv_samples: number of additional live evaluations of the last step, on the generated clip with fresh noise
            (DRaFT-LV).
        kl_terms: number of live steps with a KL term, selected at random in each training step; None means all.
        on_data: whether the denoiser is also live on the data's own clip, for the flow-matching loss.
        boundary: sigma below which the low-noise expert is used; 1 for a model with one expert.
        experts: experts with a LoRA, if the model has two experts.
        stop_latent_gradient: whether the input latents of live steps are detached, so that the gradient of the reward
            reaches each step only through its velocity in the sum of the Euler steps.
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
        """Return the Euler steps of a training step.

        Args:
            boundary: the model's own boundary, which the settings may override.
        Raises:
            ConfigError: the model has one expert, but `lora.experts` names another.
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
        """Return the live steps of one training step in ascending order; random ones use torch's CPU generator.

        They may include steps of an expert without a LoRA (see `with_graph`); the KL term of such steps is zero.
        """
        if self.strategy == "random":
            return self._at(torch.randperm(len(self._window))[: self.num_steps].sort().values.tolist())
        if self.strategy == "uniform":
            return self._spaced(torch.rand((), dtype=torch.float64).item())
        return self._fixed

    @property
    def may_be_live(self) -> tuple[int, ...]:
        """Return the steps that are live in at least one draw."""
        return self._window if self.drawn else self._fixed

    @property
    def most_live(self) -> tuple[int, ...]:
        """Return the live steps of the draw with the most activations for backward; an upper bound for `uniform`."""
        return self._extreme_draw(late=self.experts != "high")

    @property
    def live_with_lora(self) -> int:
        """Return the maximum number of live steps whose denoiser has a LoRA."""
        return len(self.with_lora(self.most_live))

    def with_lora(self, live: Sequence[int]) -> tuple[int, ...]:
        """Return those of the live steps whose denoiser has a LoRA."""
        return tuple(step for step in live if self._has_lora(step))

    def with_graph(self, live: Sequence[int]) -> tuple[int, ...]:
        """Return those of the live steps that keep activations for backward, in ascending order.

        These steps have a LoRA, or follow a step that has one and pass on its gradient through their latents.
        """
        adapted = self.with_lora(live)
        if not adapted or self.stop_latent_gradient:
            return adapted
        return tuple(step for step in live if step >= adapted[0])

    @property
    def live_uses(self) -> int:
        """Return the maximum number of live denoiser evaluations, each of which keeps activations for backward."""
        return len(self.with_graph(self.most_live)) + self.lv_samples + self.on_data

    @property
    def kl_uses(self) -> int:
        """Return the maximum number of live steps that are compared with the model without LoRA."""
        return self.live_with_lora if self.kl_terms is None else min(self.kl_terms, self.live_with_lora)

    @property
    def clips(self) -> int:
        """Return the number of clips that are decoded and rewarded for each sample."""
        return 1 + self.lv_samples

    def check_live(self) -> None:
        """Check that every draw trains a LoRA, and that each expert with a LoRA can be trained.

        Raises:
            ConfigError: no live step has a LoRA in some or all draws; no step of one expert is ever live; or
                `lv_samples` repeats the last step, which has no LoRA.
        """
        if self.lv_samples and not self._has_lora(self.end):
            raise ConfigError(
                f"backprop.lv_samples: the last step, {self.end}, belongs to an expert without a LoRA: "
                f"lora.experts is {self.experts}: set lv_samples to 0, or lora.experts to "
                f"{'high' if self.end < self.high_noise else 'low'}"
            )
        if self.experts == "both":
            self._check_both()
        elif self.experts == "high" and self._latest_first() >= self.high_noise:
            before = "an earlier step must have a gradient"
            drawn = f"a draw of {self.num_steps} steps up to grad_end_step {self.end} may contain only these"
            raise ConfigError(
                f"grad_start_step {self.start}: the low-noise expert, which has no LoRA, runs the steps "
                f"from {self.high_noise} on; {drawn if self.drawn else before}"
            )
        elif self.experts == "low" and self._earliest_last() < self.high_noise:
            beyond = "a later step must have a gradient"
            drawn = f"a draw of {self.num_steps} steps from grad_start_step {self.start} on may contain only these"
            raise ConfigError(
                f"grad_end_step {self.end}: the high-noise expert, which has no LoRA, runs the first "
                f"{self.high_noise} steps; {drawn if self.drawn else beyond}"
            )

    def _check_both(self) -> None:
        by_high = [step < self.high_noise for step in self.may_be_live]
        for expert, served in (("high", any(by_high)), ("low", not all(by_high))):
            if not served:
                steps = (
                    f"the first {self.high_noise} steps" if expert == "high" else f"the steps from {self.high_noise} on"
                )
                raise ConfigError(
                    f"lora.experts: both: the LoRA of the {expert}-noise expert would not be trained: this "
                    f"expert runs {steps}, but the steps with a gradient are "
                    f"{', '.join(map(str, self.may_be_live))}: include one of its steps, or set lora.experts to "
                    f"{'low' if expert == 'high' else 'high'}"
                )

    def _has_lora(self, step: int) -> bool:
        return self.experts in ("high" if step < self.high_noise else "low", "both")

    def _earliest_last(self) -> int:
        """Return the last live step of the draw that ends first."""
        return self._extreme_draw(late=False)[-1]

    def _latest_first(self) -> int:
        """Return the first live step of the draw that starts last."""
        return self._extreme_draw(late=True)[0]

    def _extreme_draw(self, late: bool) -> tuple[int, ...]:
        """Return the draw whose first, second, … steps are the latest or the earliest of all draws."""
        if not self.drawn:
            return self._fixed
        count, length = self.num_steps, len(self._window)
        if self.strategy == "random":
            return self._window[-count:] if late else self._window[:count]
        # `_spaced` at the largest or smallest offset, without rounding: draws change at multiples of 1 / length.
        offset = length - 1 if late else 0
        return self._at([(offset + number * length) // count for number in range(count)])

    @property
    def drawn(self) -> bool:
        """Return whether the live steps differ between training steps."""
        return self.strategy in ("random", "uniform")

    @property
    def _window(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.end + 1))

    @property
    def _fixed(self) -> tuple[int, ...]:
        """Return the live steps of a strategy without random selection."""
        if self.strategy == "steps":
            return self.steps
        return (self.end,) if self.strategy == "last" else self._window

    def _at(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._window[place] for place in places)

    def _spaced(self, offset: float) -> tuple[int, ...]:
        """Return steps at equal distances; `offset` is in [0, 1), as a fraction of the distance."""
        distance = len(self._window) / self.num_steps
        return self._at([int((offset + number) * distance) for number in range(self.num_steps)])
