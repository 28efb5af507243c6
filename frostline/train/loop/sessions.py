"""What `run.json` says of a run's sessions: which command worked on it from when to when, and what served validation.

A session is one process, or one group of them; resuming a run begins another. Its record is

    command             as it was typed
    began, until        UTC, ISO 8601; `until` is renewed whenever the run is saved, and at its end
    first_step, last_step   optimizer steps done before the session, and until `until`
    validation_calls    {use of a stage: {backend: calls}} of all validations in it
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from frostline.atomic_io import atomic_write
from frostline.runtime.stage_timer import StageTime
from frostline.train.loop.run_dir import RUN_FACTS, SESSIONS, read_facts


class SessionRecord:
    """The record of the session that is under way, and what may change in the facts of its run.

    Args:
        folder: of the run; its `run.json` is there.
        step: optimizer steps that were done before.
        facts: called for what may have changed in `run.json` meanwhile, such as what serves which stage.
    """

    def __init__(self, folder: Path, step: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._folder, self._facts = folder, facts
        self._earlier = read_sessions(folder)
        self._began, self._first_step = _now(), step
        self._calls: dict[str, dict[str, int]] = {}

    def count_validation(self, times: Mapping[str, StageTime]) -> None:
        """Add the calls of one validation."""
        for use, time in times.items():
            calls = self._calls.setdefault(use, {})
            for backend, (number, _) in time.by_backend.items():
                calls[backend] = calls.get(backend, 0) + number

    def write(self, step: int) -> None:
        """Bring `run.json` up to date, which has `step` optimizer steps done."""
        record = {
            "command": shlex.join(sys.argv),
            "began": self._began,
            "until": _now(),
            "first_step": self._first_step,
            "last_step": step,
            "validation_calls": self._calls,
        }
        write_facts(self._folder, {**read_facts(self._folder), **self._facts(), SESSIONS: [*self._earlier, record]})


def read_sessions(folder: Path) -> list[Any]:
    """Return the records in `run.json`; none where it has none, or is not whole."""
    sessions = read_facts(folder).get(SESSIONS)
    return sessions if isinstance(sessions, list) else []


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    with atomic_write(folder / RUN_FACTS) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
