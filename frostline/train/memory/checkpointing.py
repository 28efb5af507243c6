"""Choose the kind of gradient checkpointing with the least recomputation that fits in device memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from frostline.config import AUTO, CHECKPOINTING, GradientCheckpointing
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.lora.inject import lora_parameters
from frostline.models.video_shape import VideoShape
from frostline.rewards.reward import Reward
from frostline.stages.provider import Use
from frostline.stages.video_model import VideoModel
from frostline.train.memory.activation_peaks import activation_peaks
from frostline.train.memory.memory_profile import Footprint, live_uses, measure_live_stages, measure_rewards
from frostline.train.step_settings import TrainingModuleSettings

log = logging.getLogger(__name__)

# AdamW stores two moments per trained parameter.
MOMENTS = 2
# Fraction of the free memory that a step may use. Plans only count tensors; in addition, kernels need workspace,
# engines need their own memory, and allocators reserve whole pages.
_USABLE = 0.8
_GB = 1e9


@dataclass(frozen=True)
class Recomputation:
    """The chosen gradient checkpointing.

    Attributes:
        kind: the chosen kind.
        footprints: memory of each stage with this kind.
        needs: bytes that a step needs with each measured kind.
        fits: whether a step fits in the free memory; True if the free memory is unknown.
    """

    kind: GradientCheckpointing
    footprints: Mapping[str, Footprint]
    needs: Mapping[GradientCheckpointing, int]
    fits: bool


def least_recomputation(
    asked: GradientCheckpointing | Literal["auto"],
    measure: Callable[[GradientCheckpointing], Mapping[str, Footprint]],
    uses: Sequence[Use],
    training: int,
    free: int | None,
) -> Recomputation:
    """Return the requested kind; for "auto" the first kind that fits, or else the one with the lowest peak.

    Args:
        measure: returns the footprints of the stages with a kind.
        uses: the uses of stages in a step.
        training: bytes of gradients and optimizer states, which are allocated in the first steps.
        free: bytes of the device without weights, engines and adapter; None if unknown.
    """
    footprints: dict[GradientCheckpointing, Mapping[str, Footprint]] = {}
    needs: dict[GradientCheckpointing, int] = {}
    kinds = CHECKPOINTING if asked == AUTO else (asked,)
    for kind in kinds:
        footprints[kind] = measure(kind)
        needs[kind] = training + max(activation_peaks(footprints[kind], uses).values())
        if free is None or needs[kind] <= _USABLE * free:
            return Recomputation(kind, footprints[kind], needs, fits=True)
    # Recomputation needs memory, too: if few activations are saved, its peak can be higher.
    least = min(needs, key=lambda kind: needs[kind])
    return Recomputation(least, footprints[least], needs, fits=False)


def fitting_checkpointing(
    model: VideoModel,
    settings: TrainingModuleSettings,
    shape: VideoShape,
    free: int,
    rewards: Sequence[Reward] = (),
) -> GradientCheckpointing:
    """Choose gradient checkpointing for a loaded model; log a warning if no kind fits.

    The memory is measured on meta tensors, which takes seconds and allocates nothing.

    Args:
        model: the loaded model, not sharded yet.
        free: free memory of the device, in bytes.
        rewards: rewards whose networks run with a gradient.
    """
    if settings.gradient_checkpointing != AUTO:
        return settings.gradient_checkpointing
    of_rewards = measure_rewards(rewards, settings.decode.rewarded(shape, model.geometry))
    steps = DenoiseSteps.of(settings, model.boundary, len(model.experts) > 1)
    choice = least_recomputation(
        AUTO,
        lambda kind: measure_live_stages(model, shape, kind, settings.decode.num_latent_frames) | of_rewards,
        [*model.uses(steps), *live_uses(of_rewards, steps.clips)],
        (1 + MOMENTS) * sum(p.nbytes for each in model.experts for p in lora_parameters(each.network).values()),
        free,
    )
    what = _described(shape, choice.needs, free)
    if choice.fits:
        log.info("%s: %s", what, choice.kind)
    else:
        advice = "set offload_saved_tensors, or use smaller videos"
        log.warning("%s: %s, but a step may run out of memory; %s", what, choice.kind, advice)
    return choice.kind


def _described(shape: VideoShape, needs: Mapping[GradientCheckpointing, int], free: int) -> str:
    listed = ", ".join(f"{kind} {need / _GB:.2f}" for kind, need in needs.items())
    return f"gradient checkpointing: GB needed by a step of {shape}: {listed}; {free / _GB:.2f} GB are free"
