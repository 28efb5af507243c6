"""Count how often a training step uses each stage of a Wan model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.models.denoise_steps import DenoiseSteps


def step_uses(steps: DenoiseSteps, *, clip: bool) -> list[Use]:
    """Return all uses in a training step; Euler steps without a gradient and the KL reference use a frozen denoiser.

    Args:
        steps: the Euler steps.
        clip: whether the model uses the CLIP feature of the first frame.
    """
    high = min(steps.high_noise, steps.end + 1)
    once = ("text_encoder", *(("image_encoder",) if clip else ()))
    return [
        *(Use(stage, live=False, count=1, phase="conditioning") for stage in once),
        Use("vae_encoder", live=False, count=1 + steps.on_data, phase="conditioning"),
        *_expert_uses("denoiser_high_noise", range(high), steps, steps.on_data and steps.experts == "high"),
        *_expert_uses("denoiser", range(high, steps.end + 1), steps, steps.on_data and steps.experts != "high"),
        Use("vae_decoder", live=True, count=steps.clips, phase="decode"),
    ]


def _expert_uses(stage: str, served: range, steps: DenoiseSteps, on_data: bool) -> list[Use]:
    """Return the uses of one denoiser.

    With two trained experts, a step uses only one of them on the data's clips; it counts as the low-noise expert.

    Args:
        stage: name of its stage.
        served: the Euler steps that it computes.
        steps: all Euler steps of a training step.
        on_data: whether to count the use on the data's clips, for the flow-matching loss.
    """
    live, adapted = steps.with_graph(steps.most_live), steps.with_lora(steps.most_live)
    with_graph, with_lora = sum(step in live for step in served), sum(step in adapted for step in served)
    again = steps.lv_samples if steps.end in served else 0
    uses = (
        Use(stage, live=False, count=len(served) - with_graph, phase="rollout"),
        Use(stage, live=True, count=with_graph + again + on_data, phase="tail"),
        Use(stage, live=False, count=min(with_lora, steps.kl_uses), phase="tail"),
    )
    return [use for use in uses if use.count]
