"""Search for the changes of settings that make a run fit in memory, using the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.errors import ConfigError
from frostline.train.memory.advice import needed_bytes
from frostline.train.memory.measures import MEASURES, Changes, Measure, Planner
from frostline.train.settings import RunSettings

# Of what is needed: less is not worth a measure.
_LEAST_GAIN = 0.005


@dataclass(frozen=True)
class Step:
    """A measure with the values that were chosen, and bytes of each device: with it alone, and with those before it."""

    measure: Measure
    changes: Changes
    alone: int
    together: int


@dataclass(frozen=True)
class Remedy:
    """What makes a run fit.

    steps: the measures, cheapest first; none can be left out. fits: whether they are enough. settings: of the run with
    all of them. floor: bytes that are needed even then, whatever the size of the videos.
    """

    steps: tuple[Step, ...]
    settings: RunSettings
    fits: bool
    floor: int


def find_remedy(settings: RunSettings, planner: Planner, measures: Sequence[Measure] = MEASURES) -> Remedy:
    """Take measure after measure until the run fits, and leave out or make milder again what it fits without.

    Args:
        settings: the settings of a run that does not fit.
        planner: computes memory plans for the device.
        measures: the measures, the cheapest first.
    """
    assert planner.device_bytes is not None
    search = _Search(settings, planner, planner.device_bytes)
    # Where the weights alone do not fit, no smaller video does.
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
        ConfigError: they do not go together.
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
    """The settings as changed so far; the changes are under the place of their measure."""

    def __init__(self, settings: RunSettings, planner: Planner, device_bytes: int) -> None:
        self.before, self.settings, self.planner, self.device_bytes = settings, settings, planner, device_bytes
        self.taken: dict[int, dict[str, Any]] = {}

    def needed(self, settings: RunSettings) -> int:
        """Bytes of each device."""
        return needed_bytes(self.planner.plan(settings), settings, self.planner.on_cpu)

    def floor(self, settings: RunSettings) -> int:
        """Bytes that no smaller video changes much."""
        plan = self.planner.plan(settings)
        return max([plan.resident, *plan.precompute.values()])

    def fits(self, size: Callable[[RunSettings], int]) -> bool:
        return size(self.settings) <= self.device_bytes

    def take(self, place: int, measure: Measure, size: Callable[[RunSettings], int]) -> None:
        """Go through the values of a measure until the run fits; those that gain nothing are left out."""
        for changes in measure.values(self.settings, self.planner):
            taken = {**self.taken, place: {**self.taken.get(place, {}), **changes}}
            changed = self._with(taken)
            if changed is None or size(changed) > (1 - _LEAST_GAIN) * size(self.settings):
                continue
            self.taken, self.settings = taken, changed
            if self.fits(size):
                return

    def leave_out(self, place: int, measure: Measure) -> None:
        """Do without a measure if the run fits without it, or else with the mildest of its values that are enough."""
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
        """The settings with these changes; None where they do not go together."""
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
