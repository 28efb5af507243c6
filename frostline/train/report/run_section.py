"""Make the last part of a run's report: times, machine, commands, files and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from frostline.report.formatting import duration, number_of, plain
from frostline.report.page import Link, Page
from frostline.train.flatten import flatten
from frostline.train.loop.run_dir import (
    ADAPTER,
    ADAPTER_EMA,
    CONFIG,
    LOG,
    METRICS,
    RUN_FACTS,
    SESSIONS,
    SHEET,
    VALIDATION,
)
from frostline.train.report.curves import Metrics

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FILES = {
    ADAPTER: "adapter",
    ADAPTER_EMA: "averaged adapter",
    METRICS: "metrics of each step",
    VALIDATION: "validations",
    SHEET: "contact sheet",
    CONFIG: "settings",
    RUN_FACTS: "facts of the run",
    LOG: "log",
}
# Settings that are always shown, even if they have their default.
_ALWAYS = ("model",)


def show_run(page: Page, run: Path, metrics: Metrics, facts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Add times, machine, versions, links to files and settings to the page. Settings with defaults are collapsed."""
    page.heading("The run")
    page.facts({**_times(metrics, facts), **_texts(facts.get("machine")), **_texts(facts.get("versions"))})
    page.subheading("Files")
    page.facts(_files(run))
    settings, changed = flatten(config), facts.get("changed_settings")
    if not isinstance(changed, list):
        page.subheading("Settings")
        page.facts(_texts(settings))
        return
    shown = {name: value for name, value in settings.items() if name in changed or name in _ALWAYS}
    page.subheading("Settings that differ from the defaults")
    page.facts(_texts(shown))
    rest = {name: value for name, value in settings.items() if name not in shown}
    if rest:
        page.facts(_texts(rest), folded=f"{len(rest)} settings with their defaults")


def wall_clock(facts: Mapping[str, Any]) -> float | None:
    """Return the total seconds of all sessions of a run; None if they were not recorded."""
    spans = [_span(session) for session in sessions_of(facts)]
    return sum(end.timestamp() - begin.timestamp() for begin, end in spans) if spans else None


def sessions_of(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the complete records of sessions."""
    sessions = facts.get(SESSIONS)
    found = [each for each in sessions if isinstance(each, Mapping)] if isinstance(sessions, list) else []
    return [each for each in found if _is_time(each.get("began")) and _is_time(each.get("until"))]


def _times(metrics: Metrics, facts: Mapping[str, Any]) -> dict[str, str]:
    sessions, seconds = sessions_of(facts), wall_clock(facts)
    steps = sum(number_of(row, "seconds") for row in metrics)
    found = {}
    if sessions and seconds is not None:
        found["began"] = _clock(_span(sessions[0])[0])
        found["last saved" if len(sessions) == 1 else f"last saved, in session {len(sessions)}"] = _clock(
            _span(sessions[-1])[1]
        )
        found["wall-clock time"] = duration(seconds)
    found["time in training steps"] = duration(steps)
    commands = list(dict.fromkeys(str(session.get("command", "")) for session in sessions))
    for number, command in enumerate(filter(None, commands), 1):
        found["command" if number == 1 else f"command {number}"] = command
    return {name: value for name, value in found.items() if value}


def _files(run: Path) -> dict[str, Link]:
    found = {words: Link(name, name) for name, words in _FILES.items() if (run / name).exists()}
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()]
    checkpoints = sorted((int(match[1]), path.name) for match, path in numbered if match)
    return found | {f"checkpoint of step {step}": Link(name, name) for step, name in checkpoints}


def _span(session: Mapping[str, Any]) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(session["began"]), datetime.fromisoformat(session["until"])


def _is_time(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _clock(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} {time.tzname()}"


def _texts(values: object) -> dict[str, str]:
    return {str(name): plain(value) for name, value in values.items()} if isinstance(values, Mapping) else {}
