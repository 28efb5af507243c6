"""What a step holds at once, phase by phase: of each stage what one use needs, and how many uses wait for backward."""

from __future__ import annotations

from collections.abc import Mapping

from frostline.models.lazy_weights import FROZEN_PARTS
from frostline.train.memory.memory_profile import Footprint


def activation_peaks(footprints: Mapping[str, Footprint], tail: int) -> dict[str, int]:
    """The most activations that are held at once, by phase of a step.

    Args:
        tail: steps that keep activations for backward.
    """
    denoiser, decoder = footprints["denoiser"], footprints["vae_decoder"]
    # What else is live is the rewards', one after the other, and in backward the last of them first.
    rewards = [part for name, part in footprints.items() if name not in (*FROZEN_PARTS, "denoiser", "vae_decoder")]
    conditioning = [footprints[name].frozen_peak for name in footprints if name in FROZEN_PARTS]
    before_last = denoiser.kept * max(0, tail - 1)
    kept = denoiser.kept * tail
    decoded = kept + decoder.kept
    before_each = [decoded + sum(reward.kept for reward in rewards[:number]) for number in range(len(rewards))]
    backward = [
        decoded,
        *(held + reward.backward_peak for held, reward in zip(before_each, rewards, strict=True)),
        kept + decoder.backward_peak,
        before_last + denoiser.backward_peak,
    ]
    return {
        "conditioning": max(conditioning, default=0),
        "rollout": denoiser.frozen_peak,
        # The KL reference runs beside what the step keeps.
        "tail": max(before_last + denoiser.forward_peak, kept + denoiser.frozen_peak),
        "decode": kept + decoder.forward_peak,
        "reward": max((held + r.forward_peak for held, r in zip(before_each, rewards, strict=True)), default=decoded),
        "backward": max(backward),
    }
