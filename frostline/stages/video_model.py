"""What training, export and memory plan need of a video diffusion model, whatever its family.

A family is a package in this folder (see `families.py`): its stages, one file each, and a class with the methods of
`VideoModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.video_shape import Geometry, VideoShape
from frostline.runtime.stage import Tensors
from frostline.stages.conditions import Condition, ConditionInputs
from frostline.stages.provider import StageProvider, Stages, Use

if TYPE_CHECKING:
    from peft import LoraConfig

Compute = Callable[..., dict[str, Tensor]]


class DenoiserModule(Protocol):
    """A denoiser in PyTorch: `module(latents=…, timestep=…, **conditions)` returns the velocity (B, C, F, h, w).

    checkpoint_blocks: keep the input of every block for backward, and recompute the rest.
    blocks: its transformer blocks.
    """

    checkpoint_blocks: bool

    def __call__(self, **inputs: Tensor) -> Tensor: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    def parameters(self) -> Any:
        """As `nn.Module` has it."""
        ...

    def compile_blocks(self) -> None:
        """Run every block in `torch.compile`, live and frozen."""
        ...

    def first_blocks(self, count: int) -> AbstractContextManager[None]:
        """Run only the first `count` transformer blocks inside the context."""
        ...


@dataclass(frozen=True)
class Expert:
    """A denoiser and the stage of its frozen uses.

    stage: name of the stage, whose output is `velocity`. module: computes the same in PyTorch, live.
    network: the module that the LoRA is injected into. trained: whether it carries the LoRA.
    """

    stage: str
    module: DenoiserModule
    network: nn.Module
    trained: bool


@dataclass(frozen=True)
class Decoder:
    """The VAE decoder with a gradient.

    stage: name of the stage of its frozen uses. dtype: of the latents that it takes.
    whole: decodes (B, C, F, h, w) to (B, 3, T, H, W) in [-1, 1] at once.
    networks: computes of the stage's networks, in PyTorch, for backward.
    assemble: decodes with such networks; behind frames whose caches are given, or else from the first frame on.
    caches: from such networks and the leading latent frames of a clip, (B, C, F, h, w) with F of at least 1, what the
        decoder has to know of them to decode the frames behind them.
    go_on: decodes the latent frames behind those at once: (B, C, n, h, w) to (B, 3, n * temporal stride, H, W).
    """

    stage: str
    dtype: torch.dtype
    whole: Callable[[Tensor], Tensor]
    networks: Mapping[str, Compute]
    assemble: Callable[[Mapping[str, Compute], Tensor, Tensors | None], Tensor]
    caches: Callable[[Mapping[str, Compute], Tensor], Tensors]
    go_on: Callable[[Tensor, Tensors], Tensor]


@dataclass(frozen=True)
class FrozenCall:
    """A call that a memory plan measures: `call(*inputs)`, with the weights of `module`."""

    module: nn.Module
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


class VideoModel(StageProvider, Protocol):
    """A loaded model of some family, its LoRA injected.

    components: what the family's loader returned.
    geometry: the videos that it takes. latent_channels: C of the latents. dtype: of latents and conditions.
    boundary: the first of two experts serves the steps with sigma of at least this.
    experts: one denoiser, or two, that of the high noise levels first. lora_config: None without LoRA.
    needs_image: whether it generates from a first frame. condition_names: what `conditions` returns.
    """

    @property
    def components(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def boundary(self) -> float: ...
    @property
    def experts(self) -> tuple[Expert, ...]: ...
    @property
    def lora_config(self) -> LoraConfig | None: ...
    @property
    def needs_image(self) -> bool: ...
    @property
    def condition_names(self) -> tuple[str, ...]: ...

    def conditions(self, inputs: ConditionInputs, run: Stages) -> Sequence[Condition]:
        """Return the frozen inputs of the denoiser, computed by the stages of `run`."""
        ...

    def clip_latents(self, video: Tensor, run: Stages) -> Condition:
        """Return the latents (B, C, F, h, w) of whole clips, (B, T, 3, H, W) in [0, 1] on the CPU, as a condition."""
        ...

    def denoiser_inputs(self, conditions: Tensors) -> Tensors:
        """Return those conditions that the denoiser takes as inputs."""
        ...

    def constrain(self, latents: Tensor, conditions: Tensors) -> Tensor:
        """Replace the given part of (B, C, F, h, w) latents, such as the first frame; after all steps but the last.

        Return `latents` unchanged if the model has no given part.
        """
        ...

    def decoder(self) -> Decoder:
        """Return the VAE decoder."""
        ...

    def uses(self, steps: DenoiseSteps) -> Sequence[Use]:
        """Return how often a step without cached outputs uses each stage."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """Return the modules that hold all weights and tables."""
        ...

    def stage_parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return the frozen parameters of each stage, the LoRA not among them."""
        ...

    def frozen_calls(self, shape: VideoShape) -> Mapping[str, FrozenCall]:
        """Return a call of each stage that conditions a step of this shape, on inputs without meaning."""
        ...

    def denoiser_sample(self, shape: VideoShape) -> dict[str, Tensor]:
        """Return inputs of the denoiser at this shape, without meaning: latents, timestep and conditions."""
        ...
