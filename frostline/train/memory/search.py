"""Search for the changes of settings that make a run fit in memory, using the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.errors import ConfigError
from frostline.train.memory.measures import MEASURES, Changes, Measure, Planner
from frostline.train.settings import RunSettings

# A measure must reduce the needed memory by at least this fraction.
_LEAST_GAIN = 0.005


@dataclass(frozen=True)
class Step:
    """A chosen measure with its values.

    Attributes:
        alone: needed bytes per device with this measure only.
        together: needed bytes per device with this measure and those before it.
    """

    measure: Measure
    changes: Changes
    alone: int
    together: int


@dataclass(frozen=True)
class Remedy:
    """The measures that make a run fit.

    Attributes:
        steps: the measures, the cheapest first; if the run fits, all of them are necessary.
        settings: settings of the run with all measures.
        fits: whether the run fits with all measures.
        floor: bytes that are needed even then, for videos of any size.
    """

    steps: tuple[Step, ...]
    settings: RunSettings
    fits: bool
    floor: int


def find_remedy(settings: RunSettings, planner: Planner, measures: Sequence[Measure] = MEASURES) -> Remedy:
    """Add one measure after another until the run fits, then remove or weaken those that are not necessary.

    Args:
        settings: the settings of a run that does not fit.
        planner: computes memory plans for the device.
        measures: the measures, the cheapest first.
    """
    assert planner.device_bytes is not None
    search = _Search(settings, planner, planner.device_bytes)
    # Smaller videos cannot help if the weights do not fit.
    for place, measure in enumerate(measures):
        if measure.lowers == "weights" and not search.fits(search.floor):
            search.take(place, measure, search.floor)
    if search.fits(search.floor):
        for place, measure in enumerate(measures):
            if not search.fits(search.needed):
                search.take(place, measure, search.needed)
    fits = search.fits(search.needed)
    if fits:
        for place in sorted(search.taken, reverse=True):
            search.leave_out(place, measures[place])
    return Remedy(tuple(_steps(settings, search, measures)), search.settings, fits, search.floor(search.settings))


def with_changes(settings: RunSettings, changes: Changes) -> RunSettings:
    """Return settings with other values.

    Raises:
        ConfigError: the values cannot be combined.
    """
    values = settings.model_dump(mode="json")
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[key] = value
    return RunSettings.parse(values)


class _Search:
    """The settings as changed so far, and the changes by the index of their measure."""

    def __init__(self, settings: RunSettings, planner: Planner, device_bytes: int) -> None:
        self.before, self.settings, self.planner, self.device_bytes = settings, settings, planner, device_bytes
        self.taken: dict[int, dict[str, Any]] = {}

    def needed(self, settings: RunSettings) -> int:
        """Return the bytes that are needed per device."""
        return self.planner.plan(settings).needed

    def floor(self, settings: RunSettings) -> int:
        """Return the needed bytes that hardly depend on the size of the videos."""
        plan = self.planner.plan(settings)
        return max([plan.resident, *plan.precompute.values()])

    def fits(self, size: Callable[[RunSettings], int]) -> bool:
        return size(self.settings) <= self.device_bytes

    def take(self, place: int, measure: Measure, size: Callable[[RunSettings], int]) -> None:
        """Apply the values of a measure in order until the run fits; skip values that save too little."""
        for changes in measure.values(self.settings, self.planner):
            taken = {**self.taken, place: {**self.taken.get(place, {}), **changes}}
            changed = self._with(taken)
            if changed is None or size(changed) > (1 - _LEAST_GAIN) * size(self.settings):
                continue
            self.taken, self.settings = taken, changed
            if self.fits(size):
                return

    def leave_out(self, place: int, measure: Measure) -> None:
        """Remove a measure if the run fits without it; otherwise use the mildest of its values that is sufficient."""
        others = {other: changes for other, changes in self.taken.items() if other != place}
        without = self._with(others)
        if without is None:
            return
        for changes in ({}, *measure.values(without, self.planner)):
            taken = {**others, place: dict(changes)} if changes else others
            changed = self._with(taken)
            if changed is not None and self.needed(changed) <= self.device_bytes:
                self.taken, self.settings = taken, changed
                return

    def _with(self, taken: dict[int, dict[str, Any]]) -> RunSettings | None:
        """Return the settings with these changes; None if they cannot be combined."""
        try:
            return with_changes(self.before, {name: v for changes in taken.values() for name, v in changes.items()})
        except ConfigError:
            return None


def _steps(settings: RunSettings, search: _Search, measures: Sequence[Measure]) -> list[Step]:
    steps: list[Step] = []
    together = settings
    for place, changes in sorted(search.taken.items()):
        together = with_changes(together, changes)
        alone = with_changes(settings, changes)
        steps.append(Step(measures[place], changes, search.needed(alone), search.needed(together)))
    return steps
