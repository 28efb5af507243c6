"""Record the sessions of a run in `run.json`: command, times, steps, and the backends used in validations.

A session is one process, or one group of processes, that works on a run; each resume starts another session. Fields of
a record:

- `command`: the command line.
- `began`: start of the session. `until`: time of the last save, or of its end. Both are UTC, ISO 8601.
- `first_step`, `last_step`: optimizer steps completed before the session, and at `until`.
- `validation_calls`: `{use of a stage: {backend: calls}}`, summed over the validations of the session.
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
    """Keeps the record of the current session, and updates the entries of `run.json` that change during a run.

    Args:
        folder: the folder of the run.
        step: number of optimizer steps completed before the session.
        facts: returns the current values of the entries that change, such as the backend of each stage.
    """

    def __init__(self, folder: Path, step: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._folder, self._facts = folder, facts
        self._earlier = read_sessions(folder)
        self._began, self._first_step = _now(), step
        self._calls: dict[str, dict[str, int]] = {}

    def count_validation(self, times: Mapping[str, StageTime]) -> None:
        """Add the calls of one validation, given the times of each use of a stage."""
        for use, time in times.items():
            calls = self._calls.setdefault(use, {})
            for backend, (number, _) in time.by_backend.items():
                calls[backend] = calls.get(backend, 0) + number

    def write(self, step: int) -> None:
        """Update `run.json` after `step` completed optimizer steps."""
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
    """Return the records in `run.json`; an empty list if there are none, or if the file is missing or damaged."""
    sessions = read_facts(folder).get(SESSIONS)
    return sessions if isinstance(sessions, list) else []


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `run.json`.

    Raises:
        DataError: the file cannot be written.
    """
    with atomic_write(folder / RUN_FACTS) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
