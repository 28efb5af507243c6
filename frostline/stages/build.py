"""The stages of a model and its reward. Each is one module with one function, `build`, and one line below."""

from __future__ import annotations

from collections.abc import Callable

from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange

from . import denoiser, face_detector, face_embedder, image_encoder, text_encoder, vae_decoder, vae_encoder
from .inputs import FaceModels, StageInputs

_BUILDERS: tuple[Callable[[StageInputs], Stage | None], ...] = (
    text_encoder.build,
    image_encoder.build,
    vae_encoder.build,
    denoiser.build,
    denoiser.build_high_noise,
    vae_decoder.build,
)
_FACE_BUILDERS: tuple[Callable[[FaceModels, ShapeRange], Stage], ...] = (face_detector.build, face_embedder.build)


def build_stages(inputs: StageInputs) -> dict[str, Stage]:
    """All stages that the model and its reward have, by name."""
    stages = {stage.name: stage for build in _BUILDERS if (stage := build(inputs)) is not None}
    return stages if inputs.faces is None else stages | build_face_stages(inputs.faces, inputs.shapes)


def build_face_stages(faces: FaceModels, shapes: ShapeRange) -> dict[str, Stage]:
    """The stages of the reward, by name, which need no Wan model."""
    return {stage.name: stage for stage in (build(faces, shapes) for build in _FACE_BUILDERS)}
