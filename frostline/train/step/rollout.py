"""From noise to latents: the frozen rollout head, the live denoise tail and its KL term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.models.schedule import FlowMatchSchedule
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import content_key
from frostline.runtime.runtime import Runtime
from frostline.stages.denoiser import REFERENCE
from frostline.stages.video_model import Expert, VideoModel
from frostline.train.memory.recompute import recomputed
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.kl import velocity_kl

_TAIL = "denoise_tail"
# Up to so many positions of latents, the KL references of a whole tail are one call: beyond, one step's alone fill the
# device, and the others would only add to the memory that is needed.
_POSITIONS_AT_ONCE = 32768


@dataclass(frozen=True)
class Sampled:
    """What the tail leaves: latents (B, C, F, h, w) with graph, and the KL of each tail step, 0-dim with graph."""

    latents: Tensor
    kl: list[Tensor]


class Sampler:
    """Runs the Euler steps of `FlowMatchSchedule` over one or two experts.

    Args:
        high_noise_steps: so many leading steps are the first expert's, where there are two.
    """

    def __init__(self, model: VideoModel, runtime: Runtime, schedule: FlowMatchSchedule, high_noise_steps: int) -> None:
        self.model = model
        self.runtime = runtime
        self.schedule = schedule
        self.high_noise_steps = high_noise_steps

    @torch.no_grad()
    def start(
        self, conditioning: Conditioning, noise: Tensor, grad_start_step: int, conditioner: Conditioner | None
    ) -> tuple[Tensor, int]:
        """The latents after the steps of the frozen high-noise expert, and how many those were.

        Args:
            noise: (B, C, F, h, w).
            conditioner: whose cache holds the result; None where the noise is fresh and nothing could be recalled.
        """
        latents = self.model.constrain(noise, conditioning.conditions)
        steps = min(self.high_noise_steps, grad_start_step)
        if steps == 0:
            return latents, 0

        def compute(rows: list[int]) -> dict[str, Tensor]:
            some = latents[rows]
            given = {name: tensor[rows] for name, tensor in conditioning.conditions.items()}
            for index in range(steps):
                some = self._advance(some, self._frozen_velocity(some, index, given), index, given)
            return {"latents": some}

        if conditioner is None:
            return compute(list(range(len(latents))))["latents"], steps
        what = f"latents after {steps} of {self.schedule}"
        keys = [f"{key} {noise_key}" for key, noise_key in zip(conditioning.keys, _row_keys(noise), strict=True)]
        stages = [self.model.experts[0].stage, *conditioning.stages]
        return conditioner.cached_rows(what, stages, keys, compute)["latents"], steps

    @torch.no_grad()
    def head(self, latents: Tensor, conditioning: Conditioning, first: int, grad_start_step: int) -> Tensor:
        """The rollout head: steps `first … grad_start_step - 1`, on whichever backend the plan names."""
        given = conditioning.conditions
        for index in range(first, grad_start_step):
            velocity = self._frozen_velocity(latents, index, given)
            latents = self._advance(latents, velocity, index, given)
        return latents

    def tail(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        grad_start_step: int,
        grad_end_step: int,
        recompute: bool = False,
        engine_forward: bool = True,
    ) -> Sampled:
        """The denoise tail: steps `grad_start_step … grad_end_step` with graph, each with its KL term (`velocity_kl`).

        Args:
            recompute: keep for backward only the latents of each step.
            engine_forward: let the runtime serve what is recomputed; else PyTorch does both.
        """
        given = conditioning.conditions
        steps = range(grad_start_step, grad_end_step + 1)
        before, velocities = [], []
        for index in steps:
            velocity = self._live_velocity(latents, index, given, recompute, engine_forward)
            before.append(latents.detach())
            velocities.append(velocity)
            latents = self._advance(latents, velocity, index, given)
        # The experts' boundary comes first: below it nothing carries a LoRA, and there is no divergence.
        frozen = [index for index in steps if index < self.high_noise_steps]
        kl = [latents.new_zeros(()) for _ in frozen]
        bases = self._base_velocities(before[len(frozen) :], steps[len(frozen) :], given)
        for index, velocity, base in zip(steps[len(frozen) :], velocities[len(frozen) :], bases, strict=True):
            kl.append(velocity_kl(velocity, base, float(self.schedule.sigmas[index])))
        return Sampled(latents, kl)

    def _base_velocities(
        self, latents: Sequence[Tensor], steps: Sequence[int], given: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """The velocity without LoRA at each step, (B, C, F, h, w) float32: all in one call where that pays.

        None of them waits for another, as the velocities of the tail do.
        """
        count, stage = len(latents), self.model.experts[-1].stage
        if count > 1 and sum(x[:, 0].numel() for x in latents) <= _POSITIONS_AT_ONCE:
            rows = [self._inputs(x, index, given) for x, index in zip(latents, steps, strict=True)]
            inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            if self.runtime.admits(stage, inputs):
                return self.runtime.run(stage, inputs, variant=REFERENCE)["velocity"].float().chunk(count)
        return [
            self._frozen_velocity(x, index, given, variant=REFERENCE) for x, index in zip(latents, steps, strict=True)
        ]

    def _expert(self, index: int) -> Expert:
        """The expert that serves a step."""
        return self.model.experts[0] if index < self.high_noise_steps else self.model.experts[-1]

    def _advance(self, latents: Tensor, velocity: Tensor, index: int, given: Mapping[str, Tensor]) -> Tensor:
        latents = self.schedule.step(latents, velocity, index)
        last = index == self.schedule.num_inference_steps - 1
        return latents if last else self.model.constrain(latents, given)

    def _frozen_velocity(
        self, latents: Tensor, index: int, given: Mapping[str, Tensor], variant: str | None = None
    ) -> Tensor:
        """(B, C, F, h, w) float32 from the runtime."""
        inputs = self._inputs(latents, index, given)
        return self.runtime.run(self._expert(index).stage, inputs, variant=variant)["velocity"].float()

    def _live_velocity(
        self, latents: Tensor, index: int, given: Mapping[str, Tensor], recompute: bool, engine_forward: bool
    ) -> Tensor:
        """(B, C, F, h, w) float32 with the graph of PyTorch."""
        inputs, expert = self._inputs(latents, index, given), self._expert(index)

        def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
            self.runtime.stages[expert.stage].restore_weights()
            return {"velocity": expert.module(**tensors)}

        def planned(**tensors: Tensor) -> dict[str, Tensor]:
            return self.runtime.run(expert.stage, tensors, use=_TAIL)

        adapter = [parameter for parameter in expert.module.parameters() if parameter.requires_grad]
        if recompute and engine_forward:
            return recomputed(planned, in_torch, inputs, adapter)["velocity"].float()
        with self.runtime.clock.measure(_TAIL, TORCH):
            outputs = recomputed(in_torch, in_torch, inputs, adapter) if recompute else in_torch(**inputs)
            return outputs["velocity"].float()

    def _inputs(self, latents: Tensor, index: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of a denoiser. Latents are kept in fp32 between steps: small updates would drown in bf16."""
        timestep = torch.full((len(latents),), float(self.schedule.timesteps[index]), device=latents.device)
        return {"latents": latents.to(self.model.dtype), "timestep": timestep, **self.model.denoiser_inputs(given)}


def _row_keys(noise: Tensor) -> list[str]:
    return [content_key(noise=row) for row in noise]
