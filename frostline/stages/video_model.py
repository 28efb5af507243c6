"""The interface of video diffusion models of any family, for training, export and memory plan.

A family is a subpackage (see `families.py`) with one file for each stage, and a class with the methods of `VideoModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from frostline.models.block_offload import BlockOffload
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

    Attributes:
        checkpoint_blocks: keep only the input of each block for backward, and recompute the rest.
        offload: runs the blocks if weights of some are kept in main memory.
        blocks: its transformer blocks.
    """

    checkpoint_blocks: bool
    offload: BlockOffload | None

    def __call__(self, **inputs: Tensor) -> Tensor: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    def parameters(self) -> Any:
        """See `nn.Module.parameters`."""
        ...

    def compile_blocks(self) -> None:
        """Compile every block with `torch.compile`, for live and frozen uses."""
        ...

    def first_blocks(self, count: int) -> AbstractContextManager[None]:
        """Run only the first `count` transformer blocks within the context."""
        ...


@dataclass(frozen=True)
class Expert:
    """A denoiser and the stage of its frozen uses.

    Attributes:
        stage: name of the stage, whose output is `velocity`.
        module: computes the same in PyTorch, with a gradient.
        network: the submodule that the LoRA is injected into.
        trained: whether it has a LoRA.
    """

    stage: str
    module: DenoiserModule
    network: nn.Module
    trained: bool


@dataclass(frozen=True)
class Decoder:
    """The VAE decoder with a gradient.

    Attributes:
        stage: name of the stage of its frozen uses.
        dtype: dtype of the input latents.
        whole: decodes all latents at once: (B, C, F, h, w) to (B, 3, T, H, W) in [-1, 1].
        networks: PyTorch implementations of the stage's networks, for backward.
        assemble: decodes with such networks, starting after the frames whose caches are given, or at the first frame.
        caches: computes, with such networks, the caches after the leading latent frames (B, C, F, h, w), F >= 1, that
            are needed to decode the following frames.
        go_on: decodes the latent frames after those caches at once: (B, C, n, h, w) to (B, 3, n * temporal stride, H,
            W).
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
    """A loaded model of any family, with its LoRA injected.

    Attributes:
        components: the return value of the family's loader.
        geometry: its requirements on videos.
        latent_channels: C of the latents.
        dtype: dtype of latents and conditions.
        boundary: with two experts, the first one handles the steps with sigma >= boundary.
        experts: one denoiser, or two; the one for high noise levels is first.
        lora_config: None without a LoRA.
        needs_image: whether it generates from a first frame.
        condition_names: names of the return values of `conditions`.
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
        """Return the latents (B, C, F, h, w) of whole clips (B, T, 3, H, W) in [0, 1] on the CPU, as a condition."""
        ...

    def denoiser_inputs(self, conditions: Tensors) -> Tensors:
        """Return the conditions that the denoiser takes as inputs."""
        ...

    def constrain(self, latents: Tensor, conditions: Tensors) -> Tensor:
        """Set the fixed part of (B, C, F, h, w) latents, such as the first frame, to its values in `conditions`.

        Used on the initial noise, on clips with added noise, and after each step except the last. Return `latents`
        unchanged if the model has no fixed part.
        """
        ...

    def decoder(self) -> Decoder:
        """Return the VAE decoder."""
        ...

    def uses(self, steps: DenoiseSteps) -> Sequence[Use]:
        """Return the number of uses of each stage in a step without cached outputs."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """Return the modules that contain all weights and tables."""
        ...

    def stage_parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return the frozen parameters of each stage, without the LoRA."""
        ...

    def frozen_calls(self, shape: VideoShape) -> Mapping[str, FrozenCall]:
        """Return a call of each conditioning stage for a step of this shape, on placeholder inputs."""
        ...

    def denoiser_sample(self, shape: VideoShape) -> dict[str, Tensor]:
        """Return placeholder inputs of the denoiser at this shape: latents, timestep and conditions."""
        ...
