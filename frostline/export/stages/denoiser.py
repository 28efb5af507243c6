"""`denoiser` and `denoiser_high_noise`: noisy latents to velocity, the LoRA alive.

The adapter matrices and their scale are inputs of the graph, bound to the trainer's own memory: after an optimizer
step the engine is on-policy with nothing to rebuild, and with scale 0 the same engine is the KL reference.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from frostline.models.denoiser import Denoiser
from frostline.models.geometry import CLIP_FEATURE
from frostline.models.lora import adapters_off, live_scale, lora_parameters, lora_scale
from frostline.runtime.dimension import Dimension
from frostline.runtime.stage import Network, Stage, TensorSpec

from .inputs import StageInputs, tolerance

# What random adapters add to a layer, relative to its input: in bf16, too, several times what engines may differ by.
_RANDOM_LORA = 0.5


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


def _build(name: str, denoiser: Denoiser, inputs: StageInputs) -> Stage:
    network = _network(name, denoiser, inputs)
    scales = _KnownScales()

    def in_torch(*, lora_scale: Tensor | None = None, **tensors: Tensor) -> dict[str, Tensor]:
        with nullcontext() if lora_scale is None else _scaled(denoiser.model, lora_scale, scales):
            return {"velocity": denoiser(**tensors)}

    return Stage(
        name=name,
        model=inputs.components.name,
        networks=(network,),
        torch=in_torch,
        assemble=lambda runners: runners[name],
        sample=lambda: network.samples("opt"),
        tolerance=tolerance(name, inputs.dtype),
        weights=inputs.components.weights.get(name),
        base_sample=(lambda: _at_scale_zero(network.samples("opt"))) if network.live else None,
    )


def _at_scale_zero(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "lora_scale": torch.zeros_like(inputs["lora_scale"])}


class _KnownScales:
    """Values of scales that were looked at before: to look makes the host wait for a GPU."""

    def __init__(self) -> None:
        self._known: MutableMapping[Tensor, tuple[int, float]] = WeakTensorKeyDictionary()

    def value(self, scale: Tensor) -> float:
        version, value = self._known.get(scale, (None, 0.0))
        if version != scale._version:
            value = scale.item()
            self._known[scale] = (scale._version, value)
        return value


def _scaled(model: nn.Module, scale: Tensor, scales: _KnownScales) -> AbstractContextManager[None]:
    """The model at a LoRA scale; 0 skips the adapters."""
    value = scales.value(scale)
    if value == 0:
        return adapters_off(model)
    return nullcontext() if math.isclose(value, lora_scale(model), rel_tol=1e-6) else live_scale(model, scale)


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
        live=dict(zip((spec.name for spec in adapter_specs), adapter.values(), strict=True)),
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
