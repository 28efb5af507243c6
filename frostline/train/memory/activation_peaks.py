"""Compute the activation memory of each phase of a step, including activations kept for backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frostline.stages.provider import Use
from frostline.train.memory.memory_profile import Footprint

PHASES = ("conditioning", "rollout", "tail", "decode", "reward")


def activation_peaks(footprints: Mapping[str, Footprint], uses: Sequence[Use]) -> dict[str, int]:
    """Return the peak activation memory in bytes of each phase of a step, including `backward`.

    Args:
        footprints: the memory of one use of each stage; missing stages count as 0.
        uses: the uses of stages in a step.
    """
    known = [use for use in uses if use.count > 0 and use.stage in footprints]
    live = [use for phase in PHASES for use in known if use.live and use.phase == phase]
    peaks, held = {}, 0
    for phase in PHASES:
        peak = held
        for use in (use for use in live if use.phase == phase):
            footprint = footprints[use.stage]
            peak = max(peak, held + (use.count - 1) * footprint.kept + footprint.forward_peak)
            held += use.count * footprint.kept
        # Frozen uses in a phase with live ones, such as the KL reference, run while the live activations are kept.
        frozen = (footprints[use.stage].frozen_peak for use in known if not use.live and use.phase == phase)
        peaks[phase] = max(peak, held + max(frozen, default=0))
    backward = 0
    for use in reversed(live):
        footprint = footprints[use.stage]
        backward = max(backward, held - footprint.kept + footprint.backward_peak)
        held -= use.count * footprint.kept
    peaks["backward"] = backward
    return peaks
