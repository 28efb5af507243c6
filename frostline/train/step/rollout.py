"""From noise to latents: the frozen rollout head, the live denoise tail and its KL term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.models.lora.inject import LoraSwitches
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.schedule import FlowMatchSchedule
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import content_key
from frostline.runtime.runtime import Runtime
from frostline.train.memory.recompute import recomputed
from frostline.train.step.conditioning import Conditioner, Conditioning

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
        denoiser: carries the LoRA; serves all steps that the high-noise expert does not.
        denoiser_high_noise: the wholly frozen expert, if there are two.
        high_noise_steps: so many leading steps are that one's.
    """

    def __init__(
        self,
        components: WanComponents,
        denoiser: Denoiser,
        denoiser_high_noise: Denoiser | None,
        runtime: Runtime,
        schedule: FlowMatchSchedule,
        high_noise_steps: int,
    ) -> None:
        self.components = components
        self.denoiser = denoiser
        self.denoiser_high_noise = denoiser_high_noise
        self.runtime = runtime
        self.schedule = schedule
        self.high_noise_steps = high_noise_steps
        self._switches = LoraSwitches(denoiser.model)
        self._scales = {0.0: torch.zeros((), device=components.device)}

    @torch.no_grad()
    def start(
        self, conditioning: Conditioning, noise: Tensor, grad_start_step: int, conditioner: Conditioner | None
    ) -> tuple[Tensor, int]:
        """The latents after the steps of the frozen high-noise expert, and how many those were.

        Args:
            noise: (B, C, F, h, w).
            conditioner: whose cache holds the result; None where the noise is fresh and nothing could be recalled.
        """
        latents = self._pinned(noise, conditioning)
        steps = min(self.high_noise_steps, grad_start_step)
        if steps == 0:
            return latents, 0

        def compute(rows: list[int]) -> dict[str, Tensor]:
            some = latents[rows]
            given = {name: tensor[rows] for name, tensor in conditioning.denoiser_inputs().items()}
            pinned = None if conditioning.first_frame_latents is None else conditioning.first_frame_latents[rows]
            for index in range(steps):
                some = self._pin(self.schedule.step(some, self._frozen_velocity(some, index, given), index), pinned)
            return {"latents": some}

        if conditioner is None:
            return compute(list(range(len(latents))))["latents"], steps
        what = f"latents after {steps} of {self.schedule}"
        keys = [f"{key} {noise_key}" for key, noise_key in zip(conditioning.keys, _row_keys(noise), strict=True)]
        stages = ["denoiser_high_noise", "text_encoder", "vae_encoder"]
        return conditioner.cached_rows(what, stages, keys, compute)["latents"], steps

    @torch.no_grad()
    def head(self, latents: Tensor, conditioning: Conditioning, first: int, grad_start_step: int) -> Tensor:
        """The rollout head: steps `first … grad_start_step - 1`, on whichever backend the plan names."""
        given = conditioning.denoiser_inputs()
        for index in range(first, grad_start_step):
            velocity = self._frozen_velocity(latents, index, given)
            latents = self._advance(latents, velocity, index, conditioning)
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
        """The denoise tail: steps `grad_start_step … grad_end_step` with graph, each with its KL term.

        `kl_i = mean((v_lora - v_base)^2) / (2 sigma_i^2)`, `v_base` frozen.

        Args:
            recompute: keep for backward only the latents of each step.
            engine_forward: let the runtime serve what is recomputed; else PyTorch does both.
        """
        given = conditioning.denoiser_inputs()
        steps = range(grad_start_step, grad_end_step + 1)
        before, velocities = [], []
        for index in steps:
            velocity = self._live_velocity(latents, index, given, recompute, engine_forward)
            before.append(latents.detach())
            velocities.append(velocity)
            latents = self._advance(latents, velocity, index, conditioning)
        # The experts' boundary comes first: below it nothing carries a LoRA, and there is no divergence.
        frozen = [index for index in steps if index < self.high_noise_steps]
        kl = [latents.new_zeros(()) for _ in frozen]
        bases = self._base_velocities(before[len(frozen) :], steps[len(frozen) :], given)
        for index, velocity, base in zip(steps[len(frozen) :], velocities[len(frozen) :], bases, strict=True):
            sigma = float(self.schedule.sigmas[index])
            kl.append((velocity - base).pow(2).mean() / (2 * sigma**2))
        return Sampled(latents, kl)

    def _base_velocities(
        self, latents: Sequence[Tensor], steps: Sequence[int], given: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """`v_base` at each step, (B, C, F, h, w) float32: all in one call where that pays.

        None of them waits for another, as the velocities of the tail do.
        """
        count = len(latents)
        if count > 1 and sum(x[:, 0].numel() for x in latents) <= _POSITIONS_AT_ONCE:
            rows = [self._inputs(x, index) for x, index in zip(latents, steps, strict=True)]
            inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            inputs |= {name: torch.cat([tensor] * count) for name, tensor in given.items()}
            inputs |= self._base()
            if self.runtime.admits("denoiser", inputs):
                return self.runtime["denoiser"](**inputs)["velocity"].float().chunk(count)
        return [self._frozen_velocity(x, index, given, lora=False) for x, index in zip(latents, steps, strict=True)]

    def _advance(self, latents: Tensor, velocity: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        latents = self.schedule.step(latents, velocity, index)
        last = index == self.schedule.num_inference_steps - 1
        return latents if last else self._pinned(latents, conditioning)

    def _pinned(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        return self._pin(latents, conditioning.first_frame_latents)

    @staticmethod
    def _pin(latents: Tensor, first_frame: Tensor | None) -> Tensor:
        """Put the given first-frame latents back where the model wants them."""
        return latents if first_frame is None else torch.cat([first_frame.to(latents.dtype), latents[:, :, 1:]], dim=2)

    def _frozen_velocity(self, latents: Tensor, index: int, given: Mapping[str, Tensor], lora: bool = True) -> Tensor:
        """(B, C, F, h, w) float32 from the runtime."""
        inputs = {**self._inputs(latents, index), **given}
        if index < self.high_noise_steps:
            return self.runtime["denoiser_high_noise"](**inputs)["velocity"].float()
        return self.runtime["denoiser"](**inputs, **(self._policy() if lora else self._base()))["velocity"].float()

    def _policy(self) -> dict[str, Tensor]:
        """The input `lora_scale` of the model as it is; none where no single scale says what PEFT's switches do."""
        scale = self._switches.scale
        return {} if scale is None else self._lora_scale(scale)

    def _base(self) -> dict[str, Tensor]:
        """The input `lora_scale` of the model without its LoRA, the KL reference."""
        return self._lora_scale(0.0)

    def _lora_scale(self, scale: float) -> dict[str, Tensor]:
        # The same tensor at each call: to look into one on a GPU makes the host wait.
        if scale not in self._scales:
            self._scales[scale] = torch.tensor(scale, device=self.components.device)
        return {"lora_scale": self._scales[scale]}

    def _live_velocity(
        self, latents: Tensor, index: int, given: Mapping[str, Tensor], recompute: bool, engine_forward: bool
    ) -> Tensor:
        """(B, C, F, h, w) float32 with the graph of PyTorch."""
        inputs = {**self._inputs(latents, index), **given}
        if index < self.high_noise_steps:
            assert self.denoiser_high_noise is not None
            denoiser, stage, scale = self.denoiser_high_noise, "denoiser_high_noise", {}
        else:
            denoiser, stage, scale = self.denoiser, "denoiser", self._policy()

        def in_torch(**tensors: Tensor) -> dict[str, Tensor]:
            if (weights := self.components.weights.get(stage)) is not None:
                weights.restore()
            return {"velocity": denoiser(**tensors)}

        def planned(**tensors: Tensor) -> dict[str, Tensor]:
            return self.runtime.run(stage, {**tensors, **scale}, use=_TAIL)

        adapter = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        if recompute and engine_forward:
            return recomputed(planned, in_torch, inputs, adapter)["velocity"].float()
        with self.runtime.clock.measure(_TAIL, TORCH):
            outputs = recomputed(in_torch, in_torch, inputs, adapter) if recompute else in_torch(**inputs)
            return outputs["velocity"].float()

    def _inputs(self, latents: Tensor, index: int) -> dict[str, Tensor]:
        """Latents are kept in fp32 between steps: small updates would drown in bf16."""
        timestep = torch.full((len(latents),), float(self.schedule.timesteps[index]), device=latents.device)
        return {"latents": latents.to(self.components.dtype), "timestep": timestep}


def _row_keys(noise: Tensor) -> list[str]:
    return [content_key(noise=row) for row in noise]
