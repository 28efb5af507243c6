"""Sample latents from noise: the frozen rollout head, the denoise tail with its live steps, and their KL terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.schedule import TRAIN_TIMESTEPS, FlowMatchSchedule
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import content_key
from frostline.runtime.runtime import Runtime
from frostline.stages.conditions import Condition
from frostline.stages.denoiser import REFERENCE
from frostline.stages.video_model import Expert, VideoModel
from frostline.train.memory.recompute import recomputed
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.kl import velocity_kl

_TAIL = "denoise_tail"
# Maximum number of latent positions for computing the KL references of a whole tail in one call: above it, one step
# already uses the whole device, and a larger batch would only need more memory.
_POSITIONS_AT_ONCE = 32768


@dataclass(frozen=True)
class TailOptions:
    """How the live steps are computed.

    Attributes:
        recompute: keep only the latents of each live step for backward.
        engine_forward: run the first forward pass of recomputed parts in the runtime; otherwise PyTorch runs both.
    """

    recompute: bool = False
    engine_forward: bool = True


@dataclass(frozen=True)
class Sampled:
    """The result of the tail.

    Attributes:
        latents: (B, C, F, h, w) with graph; with `lv_samples` N, (B + N B, C, F, h, w), with the additional clips of
            all samples after the generated ones.
        kl: the computed KL terms by step, 0-dim with graph.
        kl_loss: their mean over all live steps, or an unbiased estimate of it, 0-dim with graph.
    """

    latents: Tensor
    kl: Mapping[int, Tensor]
    kl_loss: Tensor


@dataclass(frozen=True)
class Leading:
    """What the leading steps of B samples depend on, besides the weights.

    Attributes:
        keys: content keys of the samples' conditions.
        stages: stages that compute these.
        conditions: returns the conditions, of B rows.
        noise: (B, C, F, h, w).
    """

    keys: Sequence[str]
    stages: tuple[str, ...]
    conditions: Callable[[], Mapping[str, Tensor]]
    noise: Tensor

    @property
    def full_keys(self) -> tuple[str, ...]:
        """Return the content key of each row."""
        return tuple(f"{key} {content_key(noise=row)}" for key, row in zip(self.keys, self.noise, strict=True))

    def rows(self, rows: list[int]) -> Leading:
        """Return some of the samples."""

        def conditions() -> dict[str, Tensor]:
            return {name: tensor[rows] for name, tensor in self.conditions().items()}

        return Leading([self.keys[row] for row in rows], self.stages, conditions, self.noise[rows])


class Sampler:
    """Runs the Euler steps of `FlowMatchSchedule` with one or two experts.

    Args:
        steps: which steps may be live, and their experts.
    """

    def __init__(
        self,
        model: VideoModel,
        runtime: Runtime,
        schedule: FlowMatchSchedule,
        steps: DenoiseSteps,
    ) -> None:
        self.model = model
        self.runtime = runtime
        self.schedule = schedule
        self.steps = steps

    @torch.no_grad()
    def start(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        until: int,
        conditioner: Conditioner | None,
        base: bool = False,
    ) -> tuple[Tensor, int]:
        """Run the leading steps without any LoRA; return the latents after them and the number of steps.

        These are the steps of the high-noise expert if it is frozen, or all steps if the base model runs the rollout.

        Args:
            noise: (B, C, F, h, w).
            until: maximum number of steps; it may be smaller than the number of steps of the high-noise expert.
            conditioner: its cache stores the result; None for fresh noise, for which nothing is cached.
            base: run all steps up to `until`, without the LoRA.
        """
        steps = until if base else min(self.frozen_steps, until)
        if steps == 0:
            return self.model.constrain(noise, conditioning.conditions), 0
        leading = Leading(conditioning.keys, conditioning.stages, lambda: conditioning.conditions, noise)
        return _latents_of(self.after(steps, leading, conditioner), conditioner), steps

    @property
    def frozen_steps(self) -> int:
        """Return the number of leading steps of an expert without a LoRA."""
        return 0 if self.model.experts[0].trained else self.steps.high_noise

    def after(self, steps: int, leading: Leading, conditioner: Conditioner | None) -> Condition:
        """Return the latents (B, C, F, h, w) after the first steps, without any LoRA, not yet computed.

        Args:
            steps: at least one.
            conditioner: its cache stores the latents after the steps of an expert without a LoRA, unless these are all
                steps.
        """
        frozen = min(self.frozen_steps, steps)

        def compute(rows: list[int]) -> dict[str, Tensor]:
            own = leading.rows(rows)
            given = own.conditions()
            # Latents that only depend on an expert without a LoRA are stored separately: that expert can then stay on
            # disk.
            parted = 0 < frozen < steps
            some = _latents_of(self.after(frozen, own, conditioner), conditioner) if parted else None
            latents = self.model.constrain(own.noise, given) if some is None else some
            for index in range(frozen if parted else 0, steps):
                variant = REFERENCE if self._expert(index).trained else None
                latents = self._advance(latents, self._frozen_velocity(latents, index, given, variant), index, given)
            return {"latents": latents}

        experts = dict.fromkeys(self._expert(index).stage for index in range(steps))
        stages = (*experts, *leading.stages)
        return Condition(f"latents after {steps} of {self.schedule}", stages, leading.full_keys, compute)

    @torch.no_grad()
    def head(self, latents: Tensor, given: Mapping[str, Tensor], first: int, until: int) -> Tensor:
        """Run the rollout head, steps `first … until - 1`, on the planned backend.

        Args:
            given: conditions of the rows of `latents`.
        """
        for index in range(first, until):
            velocity = self._frozen_velocity(latents, index, given)
            latents = self._advance(latents, velocity, index, given)
        return latents

    def tail(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        live: Sequence[int],
        options: TailOptions = TailOptions(),
    ) -> Sampled:
        """Run the steps from the first live one with a LoRA to the last step that may be live.

        Live steps have a graph and, if they have a LoRA, a KL term (`velocity_kl`). The other steps are frozen. The
        gradient passes through them as the identity, because the velocity of a frozen Euler step has no graph.

        Args:
            latents: (B, C, F, h, w) before the first live step whose denoiser has a LoRA.
            live: the live steps, ascending. Steps of an expert without a LoRA count in the mean KL with a zero term. If
                they follow a step with a LoRA, the gradient also passes through the denoiser's latents.
        """
        given, steps = conditioning.conditions, self.steps
        with_lora, with_graph = steps.with_lora(live), steps.with_graph(live)
        before, velocities = {}, {}
        for index in range(with_lora[0], steps.end + 1):
            if index in with_graph:
                seen = latents.detach() if steps.stop_latent_gradient else latents
                sigma = float(self.schedule.sigmas[index])
                velocity = self._live_velocity(seen, self._expert(index), sigma, given, options)
                before[index], velocities[index] = latents.detach(), velocity
            else:
                with torch.no_grad():
                    velocity = self._frozen_velocity(latents.detach(), index, given)
            latents = self._advance(latents, velocity, index, given)
        latents = torch.cat([latents, *self._again(latents.detach(), with_lora[-1], given, options)])
        measured = _drawn(with_lora, steps.kl_terms)
        bases = self._base_velocities([before[index] for index in measured], measured, given)
        kl = {
            index: velocity_kl(velocities[index], base, float(self.schedule.sigmas[index]))
            for index, base in zip(measured, bases, strict=True)
        }
        total = torch.stack([*kl.values()]).sum() * (len(with_lora) / len(measured))
        return Sampled(latents, kl, total / len(live) + self._zero_of_idle_experts(with_lora))

    def _zero_of_idle_experts(self, with_lora: Sequence[int]) -> Tensor | float:
        """Return zero, with a zero gradient to each LoRA that no live step of this draw uses.

        Without a gradient, the optimizer would skip it, and processes with other steps could not average gradients.
        """
        used = {self._expert(index).stage for index in with_lora}
        idle = [expert for expert in self.model.experts if expert.trained and expert.stage not in used]
        parameters = [p for expert in idle for p in expert.module.parameters() if p.requires_grad]
        return sum((0 * parameter.sum() for parameter in parameters), start=0.0)

    def data_loss(self, clips: Tensor, counted: Tensor, given: Mapping[str, Tensor], options: TailOptions) -> Tensor:
        """Return the flow-matching loss of the data's own clips, `mean((v(x_sigma, sigma) - (noise - x_0))^2)`.

        One noise level is drawn for the batch, uniform in the schedule's time, among those whose denoiser has a LoRA
        (flow matching: arXiv 2210.02747; in this form, with a shift: arXiv 2403.03206).

        Args:
            clips: latents x_0 (B, C, F, h, w).
            counted: (B, F) bool, latent frames that are not padding. Parts of a clip that are given to the model, such
                as its first frame, do not count either.
        Returns:
            0-dim with graph, the mean of the samples' means.
        """
        first, last = self.model.experts[0], self.model.experts[-1]
        lowest, highest = 0.0 if last.trained else self.steps.boundary, 1.0 if first.trained else self.steps.boundary
        clips, sigma = clips.float(), self.schedule.drawn_sigma(lowest, highest)
        expert = first if sigma >= self.steps.boundary else last
        noised, noise = self._noised(clips, sigma, given)
        velocity = self._live_velocity(noised, expert, sigma, given, options)
        free = self.model.constrain(torch.full_like(clips, torch.nan), given).isnan()
        weights = (free & counted[:, None, :, None, None]).float()
        errors = (velocity - (noise - clips)).pow(2) * weights
        return (errors.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)).mean()

    def _again(self, clips: Tensor, index: int, given: Mapping[str, Tensor], options: TailOptions) -> Sequence[Tensor]:
        """Run the last step live on noised clips `lv_samples` times: DRaFT-LV (arXiv 2309.17400)."""
        sigma = float(self.schedule.sigmas[index])
        made = []
        for _ in range(self.steps.lv_samples):
            noised, _ = self._noised(clips, sigma, given)
            velocity = self._live_velocity(noised, self._expert(index), sigma, given, options)
            made.append(self._advance(noised, velocity, index, given))
        return made

    def _noised(self, clips: Tensor, sigma: float, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return clips at a noise level, with the given parts unchanged, and the noise."""
        noise = torch.randn(clips.shape).to(clips)
        return self.model.constrain((1 - sigma) * clips + sigma * noise, given), noise

    def _base_velocities(
        self, latents: Sequence[Tensor], steps: Sequence[int], given: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """Return the velocity without LoRA at each step, (B, C, F, h, w) float32, for each expert separately."""
        high = sum(index < self.steps.high_noise for index in steps)
        halves = ((latents[:high], steps[:high]), (latents[high:], steps[high:]))
        return [base for some, of in halves if of for base in self._bases_of_one_expert(some, of, given)]

    def _bases_of_one_expert(
        self, latents: Sequence[Tensor], steps: Sequence[int], given: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """Return the velocities of `_base_velocities` for steps of one expert, in one call if that is faster.

        They do not depend on each other, unlike the velocities of the tail.
        """
        count, stage = len(latents), self._expert(steps[0]).stage
        if count > 1 and sum(x[:, 0].numel() for x in latents) <= _POSITIONS_AT_ONCE:
            levels = [float(self.schedule.sigmas[index]) for index in steps]
            rows = [self._inputs(x, sigma, given) for x, sigma in zip(latents, levels, strict=True)]
            inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            if self.runtime.admits(stage, inputs):
                return self.runtime.run(stage, inputs, variant=REFERENCE)["velocity"].float().chunk(count)
        return [
            self._frozen_velocity(x, index, given, variant=REFERENCE) for x, index in zip(latents, steps, strict=True)
        ]

    def _expert(self, index: int) -> Expert:
        """Return the expert of a step."""
        return self.model.experts[0] if index < self.steps.high_noise else self.model.experts[-1]

    def _advance(self, latents: Tensor, velocity: Tensor, index: int, given: Mapping[str, Tensor]) -> Tensor:
        latents = self.schedule.step(latents, velocity, index)
        last = index == self.schedule.num_inference_steps - 1
        return latents if last else self.model.constrain(latents, given)

    def _frozen_velocity(
        self, latents: Tensor, index: int, given: Mapping[str, Tensor], variant: str | None = None
    ) -> Tensor:
        """Return the velocity (B, C, F, h, w) float32 from the runtime."""
        inputs = self._inputs(latents, float(self.schedule.sigmas[index]), given)
        return self.runtime.run(self._expert(index).stage, inputs, variant=variant)["velocity"].float()

    def _live_velocity(
        self, latents: Tensor, expert: Expert, sigma: float, given: Mapping[str, Tensor], options: TailOptions
    ) -> Tensor:
        """Return the velocity (B, C, F, h, w) float32 with PyTorch's graph."""
        inputs, recompute = self._inputs(latents, sigma, given), options.recompute

        def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
            self.runtime.stages[expert.stage].restore_weights()
            return {"velocity": expert.module(**tensors)}

        def planned(**tensors: Tensor) -> dict[str, Tensor]:
            return self.runtime.run(expert.stage, tensors, use=_TAIL)

        adapter = [parameter for parameter in expert.module.parameters() if parameter.requires_grad]
        if recompute and options.engine_forward:
            return recomputed(planned, in_torch, inputs, adapter)["velocity"].float()
        with self.runtime.clock.measure(_TAIL, TORCH):
            outputs = recomputed(in_torch, in_torch, inputs, adapter) if recompute else in_torch(**inputs)
            return outputs["velocity"].float()

    def _inputs(self, latents: Tensor, sigma: float, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a denoiser. Latents stay in fp32 between steps: small updates would be lost in bf16."""
        timestep = torch.full((len(latents),), TRAIN_TIMESTEPS * sigma, device=latents.device)
        return {"latents": latents.to(self.model.dtype), "timestep": timestep, **self.model.denoiser_inputs(given)}


def _drawn(steps: Sequence[int], count: int | None) -> Sequence[int]:
    """Return this number of random steps, ascending, from torch's CPU generator."""
    if count is None or count >= len(steps):
        return steps
    return [steps[place] for place in torch.randperm(len(steps))[:count].sort().values.tolist()]


def _latents_of(condition: Condition, conditioner: Conditioner | None) -> Tensor:
    """Return the latents of all rows, from the cache if there is one."""
    if conditioner is None:
        return condition.compute(list(range(len(condition.keys))))["latents"]
    return conditioner.cached(condition)["latents"]


def fixed_noise(seed: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Return the start noise (B, C, F, h, w) of a run with fixed noise: the same for every sample and step.

    Generated on the CPU, so that it does not depend on the device.
    """
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).expand(count, *shape)
