"""The stages `denoiser` and `denoiser_high_noise`: noisy latents and conditions to velocity."""

from __future__ import annotations

from frostline.models.lora.inject import lora_parameters
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.video_shape import CLIP_FEATURE
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Stage, TensorSpec
from frostline.stages.denoiser import denoiser_stage, random_timesteps
from frostline.stages.tolerances import tolerance

from .inputs import StageInputs


def build(inputs: StageInputs) -> Stage:
    """Return the denoiser stage; for a model with two experts, the low-noise expert."""
    return _build("denoiser", inputs.denoiser, inputs)


def build_high_noise(inputs: StageInputs) -> Stage | None:
    """Return the stage of the high-noise expert, for models that have one."""
    expert = inputs.denoiser_high_noise
    return None if expert is None else _build("denoiser_high_noise", expert, inputs)


def _build(name: str, denoiser: Denoiser, inputs: StageInputs) -> Stage:
    components, dtype = inputs.components, inputs.components.dtype
    batch, grid = inputs.shapes.dimension("batch"), _latent_grid(inputs)
    channels = components.vae.model.z_dim
    specs = [
        TensorSpec("latents", (batch, channels, *grid), dtype),
        TensorSpec("timestep", (batch,), fill=random_timesteps),
        TensorSpec("context", (batch, components.text_length, components.text_encoder.dim), dtype),
    ]
    if components.takes_image_latents:
        specs.append(TensorSpec("y", (batch, denoiser.model.in_dim - channels, *grid), dtype))
    if components.takes_clip_feature:
        specs.append(TensorSpec("clip_feature", (batch, *CLIP_FEATURE), dtype))
    return denoiser_stage(
        name,
        denoiser,
        denoiser.model,
        tuple(specs),
        inputs.shapes.dimension("rank"),
        model=components.name,
        tolerance=tolerance(dtype),
        license=components.license,
        # The weights of an expert with a LoRA stay in memory.
        weights=None if lora_parameters(denoiser.model) else components.weights.get(name),
    )


def _latent_grid(inputs: StageInputs) -> tuple[Dimension, Dimension, Dimension]:
    geometry = inputs.components.spec.geometry
    per_block = geometry.spatial_multiple // geometry.spatial_stride
    return (
        inputs.shapes.dimension("latent_frames"),
        inputs.pixels("height", per_block),
        inputs.pixels("width", per_block),
    )
