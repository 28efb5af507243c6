"""How often a training step uses each stage of a Wan model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.models.denoise_steps import DenoiseSteps


def step_uses(steps: DenoiseSteps, *, clip: bool) -> list[Use]:
    """Return the uses of a step; the rollout head and the KL reference run the denoiser frozen.

    Args:
        clip: whether the model is conditioned on the CLIP feature of the first frame.
    """
    trained = steps.tail_with_lora
    once = ("text_encoder", *(("image_encoder",) if clip else ()), "vae_encoder")
    return [
        *(Use(stage, live=False, count=1, phase="conditioning") for stage in once),
        Use("denoiser_high_noise", live=False, count=min(steps.high_noise, steps.mid), phase="rollout"),
        Use("denoiser", live=False, count=max(0, steps.mid - steps.high_noise), phase="rollout"),
        Use("denoiser_high_noise", live=True, count=steps.final + 1 - steps.mid - trained, phase="tail"),
        Use("denoiser", live=True, count=trained, phase="tail"),
        Use("denoiser", live=False, count=trained, phase="tail"),
        Use("vae_decoder", live=True, count=1, phase="decode"),
    ]
