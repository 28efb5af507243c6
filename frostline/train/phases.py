"""What a step holds at once, phase by phase: of each stage what one use needs, and how many uses wait for backward."""

from __future__ import annotations

from collections.abc import Mapping

from frostline.config import TrainingModuleSettings
from frostline.models.schedule import FlowMatchSchedule
from frostline.train.footprint import Footprint

# Frozen wherever they are used: PyTorch needs no weights of them once an engine or the cache serves them.
ALWAYS_FROZEN = ("text_encoder", "image_encoder", "vae_encoder", "denoiser_high_noise")


def tail_steps(settings: TrainingModuleSettings, boundary: float | None) -> int:
    """Steps that keep activations for backward: those of the tail that the denoiser with the LoRA serves."""
    first = settings.mid_timestep
    if boundary is not None:
        schedule = FlowMatchSchedule(settings.num_inference_steps, settings.shift)
        boundary = boundary if settings.boundary is None else settings.boundary
        first = max(first, schedule.high_noise_steps(boundary))
    return max(0, settings.final_timestep + 1 - first)


def activation_peaks(footprints: Mapping[str, Footprint], tail: int) -> dict[str, int]:
    """The most activations that are held at once, by phase of a step."""
    denoiser, decoder = footprints["denoiser"], footprints["vae_decoder"]
    embedder = footprints.get("face_embedder", Footprint(0, 0))
    conditioning = [footprints[name].frozen_peak for name in footprints if name in ALWAYS_FROZEN]
    before_last = denoiser.kept * max(0, tail - 1)
    kept = denoiser.kept * tail
    decoded = kept + decoder.kept
    backward = [
        decoded + embedder.backward_peak,
        kept + decoder.backward_peak,
        before_last + denoiser.backward_peak,
    ]
    return {
        "conditioning": max(conditioning, default=0),
        "rollout": denoiser.frozen_peak,
        # The KL reference runs beside what the step keeps.
        "tail": max(before_last + denoiser.forward_peak, kept + denoiser.frozen_peak),
        "decode": kept + decoder.forward_peak,
        "reward": decoded + embedder.forward_peak,
        "backward": max(backward),
    }
