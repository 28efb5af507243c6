"""Log the values in `metrics.jsonl` and `validation.jsonl` to experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from frostline.errors import ConfigError
from frostline.train.flatten import flatten

PROJECT = "frostline"
_LEFT_OUT = ("step", "skipped")


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed; accelerate would silently continue without them.

    Raises:
        ConfigError: one is not installed; the message names the package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> None:
    """Start the trackers, and pass them the settings of the run.

    Raises:
        ConfigError: a tracker cannot be started (not logged in, no place to write to …).
    """
    if accelerator.log_with:
        # TensorBoard only accepts plain values.
        plain = {name: _plain(value) for name, value in flatten(config, "/").items()}
        try:
            accelerator.init_trackers(PROJECT, config=plain)
        except Exception as error:  # each has its own types of exceptions
            names = ", ".join(map(str, accelerator.log_with))
            raise ConfigError(f"train.report_to: {names} cannot be started: {error}") from error


def track(accelerator: Accelerator, line: Mapping[str, Any], section: str) -> None:
    """Log the numbers of a JSON line as `section/…`, at its step."""
    if accelerator.log_with:
        numbers = {f"{section}/{name}": value for name, value in flatten(line, "/").items() if _is_number(name, value)}
        accelerator.log(numbers, step=line["step"])


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write buffered values."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _is_number(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in _LEFT_OUT


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) else str(value)
