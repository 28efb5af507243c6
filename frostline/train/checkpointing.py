"""Gradient checkpointing by memory: the least recomputation with which a step fits the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from frostline.config import AUTO, CHECKPOINTING, GradientCheckpointing, TrainingModuleSettings
from frostline.models.components import WanComponents
from frostline.models.geometry import VideoShape
from frostline.models.lora import lora_parameters
from frostline.train.footprint import measure_embedder, measure_live_stages
from frostline.train.memory import MOMENTS, USABLE, activation_peaks, tail_steps

log = logging.getLogger(__name__)

_GB = 1e9


def fitting_checkpointing(
    components: WanComponents,
    settings: TrainingModuleSettings,
    shape: VideoShape,
    free: int,
    embedder: nn.Module | None = None,
) -> GradientCheckpointing:
    """The first of none, block and full with which a step fits; where none does, the least, with a warning.

    Measured on tensors without content: that takes seconds, and no memory.

    Args:
        components: a loaded model with its LoRA, not sharded.
        free: bytes of the device that are free now.
        embedder: of the reward, to be counted too.
    """
    if settings.gradient_checkpointing != AUTO:
        return settings.gradient_checkpointing
    tail = tail_steps(settings, None if components.denoiser_high_noise is None else components.boundary)
    # Gradients and AdamW's moments come with the first steps.
    trained = (1 + MOMENTS) * sum(p.nbytes for p in lora_parameters(components.denoiser).values())
    faces = shape.batch_size * shape.num_frames
    reward = {} if embedder is None else {"face_embedder": measure_embedder(embedder, faces)}
    needs: dict[GradientCheckpointing, int] = {}
    for kind in CHECKPOINTING:
        footprints = {**measure_live_stages(components, shape, kind), **reward}
        needs[kind] = trained + max(activation_peaks(footprints, tail).values())
        if needs[kind] <= USABLE * free:
            log.info("%s: %s", _described(shape, needs, free), kind)
            return kind
    # To recompute takes memory too: where little is kept, it may need more.
    least = min(needs, key=lambda kind: needs[kind])
    what = _described(shape, needs, free)
    log.warning("%s: %s, and it may not do; offload_saved_tensors and smaller videos need less", what, least)
    return least


def _described(shape: VideoShape, needs: Mapping[GradientCheckpointing, int], free: int) -> str:
    size = f"{shape.batch_size}x{shape.num_frames}x{shape.height}x{shape.width}"
    listed = ", ".join(f"{kind} {need / _GB:.2f}" for kind, need in needs.items())
    return f"gradient checkpointing: a step of {size} needs GB: {listed}; {free / _GB:.2f} are free"
