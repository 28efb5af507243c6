"""The stages of a model. Each is one module with one function, `build`, and one line below."""

from __future__ import annotations

from collections.abc import Callable

from frostline.runtime.stage import Stage

from . import denoiser, image_encoder, text_encoder, vae_decoder, vae_encoder
from .inputs import StageInputs

_BUILDERS: tuple[Callable[[StageInputs], Stage | None], ...] = (
    text_encoder.build,
    image_encoder.build,
    vae_encoder.build,
    denoiser.build,
    denoiser.build_high_noise,
    vae_decoder.build,
)


def build_stages(inputs: StageInputs) -> dict[str, Stage]:
    """All stages that the model has, by name."""
    return {stage.name: stage for build in _BUILDERS if (stage := build(inputs)) is not None}
