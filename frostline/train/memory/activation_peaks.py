"""What a step holds at once, phase by phase: of each stage what one use needs, and how many uses wait for backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frostline.stages.provider import Use
from frostline.train.memory.memory_profile import Footprint

PHASES = ("conditioning", "rollout", "tail", "decode", "reward")


def activation_peaks(footprints: Mapping[str, Footprint], uses: Sequence[Use]) -> dict[str, int]:
    """Return the most activations that are held at once, by phase of a step, `backward` among them.

    Args:
        footprints: of stages; those that are missing count nothing.
        uses: of a step.
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
        # Frozen uses of a phase with live ones, such as the KL reference, run beside what those keep.
        frozen = (footprints[use.stage].frozen_peak for use in known if not use.live and use.phase == phase)
        peaks[phase] = max(peak, held + max(frozen, default=0))
    backward = 0
    for use in reversed(live):
        footprint = footprints[use.stage]
        backward = max(backward, held - footprint.kept + footprint.backward_peak)
        held -= use.count * footprint.kept
    peaks["backward"] = backward
    return peaks
