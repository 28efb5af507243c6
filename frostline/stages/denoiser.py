"""`denoiser` and `denoiser_high_noise`: noisy latents to velocity, the LoRA alive.

The adapter matrices and their scale are inputs of the graph, bound to the trainer's own memory: after an optimizer
step the engine is on-policy with nothing to rebuild, and with scale 0 the same engine is the KL reference.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from frostline.models.lora.inject import LoraSwitches, adapters_off, live_scale, lora_parameters, lora_scale
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.video_shape import CLIP_FEATURE
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import ModuleState, ModuleTensors, Network, Stage, TensorSpec

from .inputs import StageInputs, tolerance

# What random adapters add to a layer, relative to its input: in bf16, too, several times what engines may differ by.
_RANDOM_LORA = 0.5
_DESCRIPTION = (
    "Predict the flow-matching velocity (noise minus clip) from noisy latents. timestep: sigma times 1000. Inputs that "
    "begin with `lora.` are the matrices of a LoRA, A of (rank, in) and B of (out, rank). lora_scale: alpha / rank, or "
    "0 for the model without the LoRA."
)


class LiveLoraDenoiser(nn.Module):
    """`Denoiser.forward` for tracing.

    The positional inputs are `latents, timestep, context`, then those of `conditions` that the model takes, then
    `lora_scale` (0-dim, `alpha / rank`, or 0 for the KL reference), then the adapter matrices. The last two are
    missing where the denoiser has no adapter.
    """

    def __init__(self, denoiser: Denoiser, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.conditions = conditions
        self.adapter_names = [f"model.{name}" for name in lora_parameters(denoiser.model)]

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, *others: Tensor) -> Tensor:
        """Predict the velocity, (B, C, F, H, W)."""
        conditions = dict(zip(self.conditions, others, strict=False))
        inputs = (latents, timestep, context)
        if not self.adapter_names:
            return self.denoiser(*inputs, **conditions)
        scale, *adapter = others[len(self.conditions) :]
        tensors = dict(zip(self.adapter_names, adapter, strict=True))
        with live_scale(self.denoiser.model, scale):
            return torch.func.functional_call(self.denoiser, tensors, inputs, conditions)


def build(inputs: StageInputs) -> Stage:
    """The denoiser, or the low-noise expert of two."""
    return _build("denoiser", inputs.denoiser, inputs)


def build_high_noise(inputs: StageInputs) -> Stage | None:
    """The high-noise expert, for models that have one."""
    expert = inputs.denoiser_high_noise
    return None if expert is None else _build("denoiser_high_noise", expert, inputs)


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(Stage):
    """One network. Where it has a LoRA, the input `lora_scale` may be left out in PyTorch: the model as it is."""

    denoiser: Denoiser

    def torch(self, *, lora_scale: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Predict the velocity at a LoRA scale; 0 skips the adapters."""
        with nullcontext() if lora_scale is None else _scaled(self.denoiser.model, lora_scale):
            return {"velocity": self.denoiser(**inputs)}

    def base_sample(self) -> dict[str, Tensor] | None:
        """Return a sample at scale 0."""
        if not self.networks[0].live:
            return None
        sample = self.sample()
        return {**sample, "lora_scale": torch.zeros_like(sample["lora_scale"])}

    def module_state(self) -> ModuleState:
        """Return a check of the LoRA layers' switches."""
        return LoraSwitches(self.denoiser.model).conflict


def _build(name: str, denoiser: Denoiser, inputs: StageInputs) -> Stage:
    return DenoiserStage(
        name=name,
        model=inputs.components.name,
        description=_DESCRIPTION,
        license=inputs.components.license,
        networks=(_network(name, denoiser, inputs),),
        tolerance=tolerance(inputs.dtype),
        weights=inputs.components.weights.get(name),
        denoiser=denoiser,
    )


# Values of scales that were looked at before, with their versions: to look makes the host wait for a GPU.
_known_scales: MutableMapping[Tensor, tuple[int, float]] = WeakTensorKeyDictionary()


def _value(scale: Tensor) -> float:
    version, value = _known_scales.get(scale, (None, 0.0))
    if version != scale._version:
        value = scale.item()
        _known_scales[scale] = (scale._version, value)
    return value


def _scaled(model: nn.Module, scale: Tensor) -> AbstractContextManager[None]:
    """The model at a LoRA scale; 0 skips the adapters."""
    value = _value(scale)
    if value == 0:
        return adapters_off(model)
    now = LoraSwitches(model).scale
    return nullcontext() if now is not None and math.isclose(value, now, rel_tol=1e-6) else live_scale(model, scale)


def _network(name: str, denoiser: Denoiser, inputs: StageInputs) -> Network:
    shapes, components, dtype = inputs.shapes, inputs.components, inputs.dtype
    batch, grid = shapes.dimension("batch"), _latent_grid(inputs)
    channels = components.vae.model.z_dim
    conditions = []
    if components.takes_image_latents:
        conditions.append(TensorSpec("y", (batch, denoiser.model.in_dim - channels, *grid), dtype))
    if components.takes_clip_feature:
        conditions.append(TensorSpec("clip_feature", (batch, *CLIP_FEATURE), dtype))
    context = (batch, components.text_length, components.text_encoder.dim)
    adapter = lora_parameters(denoiser.model)
    scale, rank = lora_scale(denoiser.model) if adapter else 0.0, shapes.dimension("rank")
    adapter_specs = tuple(_adapter_spec(name, matrix, rank, scale) for name, matrix in adapter.items())
    paths = dict(zip((spec.name for spec in adapter_specs), adapter, strict=True))
    return Network(
        name,
        LiveLoraDenoiser(denoiser, tuple(condition.name for condition in conditions)).eval(),
        (
            TensorSpec("latents", (batch, channels, *grid), dtype),
            TensorSpec("timestep", (batch,), torch.float32, _random_timesteps),
            TensorSpec("context", context, dtype),
            *conditions,
            *([_scale_spec(scale)] if adapter else []),
        ),
        ("velocity",),
        live=ModuleTensors(denoiser.model, paths),
        live_specs=adapter_specs,
    )


def _latent_grid(inputs: StageInputs) -> tuple[Dimension, Dimension, Dimension]:
    per_block = inputs.components.spatial_multiple // inputs.components.spatial_stride
    return (
        inputs.shapes.dimension("latent_frames"),
        inputs.pixels("height", per_block),
        inputs.pixels("width", per_block),
    )


def _random_timesteps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 1000 * torch.rand(shape, generator=generator)


def _scale_spec(scale: float) -> TensorSpec:
    return TensorSpec("lora_scale", (), fill=lambda shape, generator: torch.full(shape, scale))


def _adapter_spec(parameter_name: str, matrix: Tensor, rank: Dimension, scale: float) -> TensorSpec:
    """The graph input of one adapter matrix: A is (rank, in), B is (out, rank)."""
    name = "lora." + parameter_name.replace(".default.weight", "")
    first = ".lora_A." in parameter_name
    shape = (rank, matrix.shape[1]) if first else (matrix.shape[0], rank)
    gain = 1.0 if first else _RANDOM_LORA / scale

    def fill(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # Each sums over its second dimension: B A x, times the scale, is then of the size of x at any rank and scale.
        return gain / math.sqrt(shape[1]) * torch.randn(shape, generator=generator)

    return TensorSpec(name, shape, matrix.dtype, fill)
