"""Experiment trackers, through accelerate: the figures of `metrics.jsonl` as curves elsewhere."""

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
    """Refuse what is not installed; accelerate would go on without a word.

    Raises:
        ConfigError: names the package to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> None:
    """Tell the trackers what is about to run.

    Raises:
        ConfigError: one cannot be started (not logged in, no place to write to …).
    """
    if accelerator.log_with:
        # TensorBoard takes plain values only.
        plain = {name: _plain(value) for name, value in flatten(config, "/").items()}
        try:
            accelerator.init_trackers(PROJECT, config=plain)
        except Exception as error:  # each has errors of its own
            names = ", ".join(map(str, accelerator.log_with))
            raise ConfigError(f"train.report_to: {names} cannot be started: {error}") from error


def track(accelerator: Accelerator, line: Mapping[str, Any], section: str) -> None:
    """Log the numbers of a line of JSON under `section/…`, by its step."""
    if accelerator.log_with:
        numbers = {f"{section}/{name}": value for name, value in flatten(line, "/").items() if _is_number(name, value)}
        accelerator.log(numbers, step=line["step"])


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they still hold."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _is_number(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in _LEFT_OUT


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) else str(value)
