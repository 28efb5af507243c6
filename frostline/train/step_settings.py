"""Settings of a training step: what `TrainingModule.from_pretrained` takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from frostline.config import BackpropStrategy, GradientCheckpointing, LoraSettings, Settings
from frostline.models.video_shape import Geometry, VideoShape
from frostline.rewards.config import RewardConfig, RewardEntry, default_rewards

# What the reference calls two settings (arXiv 2510.14255): accepted wherever these are.
_NAMES_OF_THE_REFERENCE = {"mid_timestep": "grad_start_step", "final_timestep": "grad_end_step"}


class BackpropSettings(Settings):
    """Through which steps, and how, the gradient of the reward flows to the LoRA."""

    strategy: BackpropStrategy = Field(
        default="tail",
        description="live steps: tail (grad_start_step to grad_end_step), last (grad_end_step), random or uniform "
        "(num_steps of grad_start_step to grad_end_step, drawn for each training step), steps (those listed)",
    )
    num_steps: int | None = Field(default=None, ge=1, description="live steps of a draw; of random and uniform alone")
    steps: tuple[int, ...] = Field(default=(), description="the live steps; of the strategy steps alone")
    stop_latent_gradient: bool = Field(
        default=False, description="no gradient through the denoiser's latent input: each live step for itself"
    )
    lv_samples: int = Field(
        default=0,
        ge=0,
        description="also reward so many clips that the last step makes of the generated one with fresh noise "
        "(DRaFT-LV, arXiv 2309.17400): less variance; of the strategy last alone",
    )
    kl_steps: str = Field(
        default="all", description="live steps with a KL term: all, or random:N, an unbiased estimate at N/all its cost"
    )

    @field_validator("kl_steps")
    @classmethod
    def _all_or_so_many(cls, value: str) -> str:
        if re.fullmatch(r"all|random:[1-9]\d*", value) is None:
            raise ValueError(f"must be all or random:N with N of at least 1, not {value!r}")
        return value

    @property
    def kl_terms(self) -> int | None:
        """The N of `kl_steps`; None means all."""
        kind, _, count = self.kl_steps.partition(":")
        return None if kind == "all" else int(count)

    @model_validator(mode="after")
    def _strategy_has_what_it_needs(self) -> Self:
        drawn = self.strategy in ("random", "uniform")
        if drawn != (self.num_steps is not None):
            raise ValueError(f"num_steps: {'is needed by' if drawn else 'means nothing to'} strategy {self.strategy}")
        if (self.strategy == "steps") != bool(self.steps):
            needed = "is needed by" if self.strategy == "steps" else "means nothing to"
            raise ValueError(f"steps: {needed} strategy {self.strategy}")
        if sorted({*self.steps}) != [*self.steps]:
            raise ValueError(f"steps: must ascend, each step once, not {[*self.steps]}")
        if self.lv_samples and self.strategy != "last":
            raise ValueError(f"lv_samples: means nothing to strategy {self.strategy}: it belongs to last")
        return self


class DecodeSettings(Settings):
    """Which part of the clip is decoded with gradient; rewards look at it alone."""

    num_latent_frames: int | None = Field(
        default=None,
        ge=1,
        description="latent frames that are decoded with gradient; those before them are decoded without, those after "
        "them not at all; the whole clip if not given",
    )
    position: Literal["random", "first", "last"] = Field(
        default="random", description="where these latent frames are in the clip; random: drawn for each training step"
    )

    def draw(self, latent_frames: int) -> slice:
        """Return the latent frames to decode of so many, drawn from torch's generator of the CPU where it is random."""
        import torch

        left = 0 if self.num_latent_frames is None else max(0, latent_frames - self.num_latent_frames)
        first = left if self.position == "last" else 0
        if self.position == "random" and left:
            first = int(torch.randint(left + 1, ()))
        return slice(first, latent_frames - left + first)

    def rewarded(self, shape: VideoShape, geometry: Geometry) -> VideoShape:
        """Return the most that rewards look at, of clips of `shape`: the start frame and the frames of the window."""
        frames = shape.num_frames
        if self.num_latent_frames is not None:
            # Behind the first latent frame a window has no start frame of its own.
            frames = geometry.num_frames(self.num_latent_frames + (self.position != "first"))
        return replace(shape, num_frames=min(frames, shape.num_frames))


class RolloutSettings(Settings):
    """How the latents before the first step with gradient are made."""

    policy: str = Field(
        default="current",
        description="who runs the steps before the first with gradient: current (the model as it is trained), base "
        "(without LoRA, so that they are computed once and cached), stale:K (the latents of the sample's last visit, "
        "if it was at most K optimizer steps ago)",
    )

    @field_validator("policy")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if re.fullmatch(r"current|base|stale:[1-9]\d*", value) is None:
            raise ValueError(f"must be current, base or stale:K with K of at least 1, not {value!r}")
        return value

    @property
    def max_age(self) -> int:
        """Return for how many optimizer steps latents are reused: the K of `stale:K`, or 0."""
        return int(self.policy.partition(":")[2] or 0)


class TrainingModuleSettings(Settings):
    """One training step; the defaults are those of the reference (IPRO, arXiv 2510.14255)."""

    num_inference_steps: int = Field(default=8, ge=1, description="N, Euler steps from noise to video")
    grad_start_step: int = Field(default=4, ge=0, description="first step with gradient")
    grad_end_step: int = Field(default=7, ge=0, description="last step with gradient")
    backprop: BackpropSettings = BackpropSettings()
    decode: DecodeSettings = DecodeSettings()
    rollout: RolloutSettings = RolloutSettings()
    shift: float = Field(default=5.0, gt=0, description="s of the sigma schedule")
    boundary: float | None = Field(default=None, ge=0, le=1, description="of two experts; the model's own if not given")
    noise_seed: int | None = Field(default=24, description="seed of the start noise; null draws fresh noise every step")
    kl_weight: float = Field(default=1.0, ge=0, description="weight of the KL term in the loss")
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="KL loss that training is held near, by adapting the weight from kl_weight on (arXiv 1909.08593); "
        "the weight is constant if not given",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the flow-matching loss on the data's own clips in the loss; needs videos",
    )
    gradient_checkpointing: GradientCheckpointing | Literal["auto"] = Field(
        default="auto",
        description="recompute nothing (none), every block, or the whole denoiser and VAE decode (full) in backward; "
        "auto: the first of these that fits the memory",
    )
    engine_forward: bool = Field(
        default=True,
        description="let the plan's engines compute what backward recomputes: the VAE decode under block and full, the "
        "denoise tail under full; the gradient is PyTorch's",
    )
    torch_compile: bool = Field(
        default=False, description="compile the denoiser's blocks in the first step: worth its minute on a GPU"
    )
    offload_saved_tensors: bool = Field(
        default=False, description="keep what backward needs in main memory instead of the GPU's: slower, smaller"
    )
    lora: LoraSettings = LoraSettings()
    rewards: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default_factory=default_rewards, description="what is rewarded, each by its type; the sum joins the loss"
    )
    cache_dir: Path | None = Field(default=None, description="where frozen outputs are kept; memory if not given")
    cache_bytes: int = Field(default=8 * 2**30, ge=0, description="bound of the frozen-output cache; 0 switches it off")

    @model_validator(mode="before")
    @classmethod
    def _take_the_names_of_the_reference(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for theirs, ours in _NAMES_OF_THE_REFERENCE.items():
            if theirs in values and ours in values:
                raise ValueError(f"{theirs} is another name of {ours}: set one of them")
        return {_NAMES_OF_THE_REFERENCE.get(name, name): value for name, value in values.items()}

    @field_validator("rewards")
    @classmethod
    def _something_is_rewarded(cls, value: tuple[RewardEntry, ...]) -> tuple[RewardEntry, ...]:
        if not value:
            raise ValueError("names none: nothing would be rewarded")
        return value

    @model_validator(mode="after")
    def _steps_are_ordered(self) -> Self:
        if not self.grad_start_step <= self.grad_end_step < self.num_inference_steps:
            raise ValueError(
                f"grad_start_step <= grad_end_step < num_inference_steps must hold, not {self.grad_start_step}, "
                f"{self.grad_end_step}, {self.num_inference_steps}"
            )
        if self.kl_target is not None and self.kl_weight == 0:
            raise ValueError("kl_target: kl_weight 0 cannot be adapted: begin with a weight above 0")
        if self.rollout.max_age and self.noise_seed is None:
            raise ValueError("rollout.policy: stale:K reuses latents of the same noise: set noise_seed")
        if self.backprop.lv_samples and self.grad_end_step != self.num_inference_steps - 1:
            raise ValueError(
                f"backprop.lv_samples: needs the whole trajectory: grad_end_step {self.num_inference_steps - 1}, not "
                f"{self.grad_end_step}"
            )
        backprop, window = self.backprop, self.grad_end_step - self.grad_start_step + 1
        if backprop.num_steps is not None and backprop.num_steps > window:
            raise ValueError(
                f"backprop.num_steps: {backprop.num_steps} of the {window} steps from grad_start_step to grad_end_step"
            )
        if backprop.steps and not self.grad_start_step <= backprop.steps[0] <= backprop.steps[-1] <= self.grad_end_step:
            raise ValueError(
                f"backprop.steps: must be within grad_start_step {self.grad_start_step} and grad_end_step "
                f"{self.grad_end_step}, not {[*backprop.steps]}"
            )
        return self

    @model_validator(mode="after")
    def _rewards_see_what_they_compare(self) -> Self:
        for number, entry in enumerate(self.rewards):
            gap = self.decode.num_latent_frames and self.decode.position != "first"
            if gap and isinstance(entry, RewardConfig) and entry.needs_neighbours:
                raise ValueError(
                    f"rewards.{number} {entry.type}: compares neighbouring frames, and decode.num_latent_frames leaves "
                    "a gap behind the start frame: decode the whole clip, or set decode.position to first"
                )
        return self
