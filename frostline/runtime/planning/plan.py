"""The plan: the backend of each frozen stage, and the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from frostline.config import AUTO, OTHERS
from frostline.errors import ConfigError
from frostline.runtime.backends import TORCH

PlanSetting = str | Mapping[str, str]


def parse_plan(text: str) -> str | dict[str, str]:
    """Parse a plan of the command line: `auto`, one backend for all stages, or `stage=backend,…` (`*`: all others).

    Raises:
        ConfigError: the text is invalid.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) == 1 and "=" not in parts[0]:
        return parts[0]
    pairs = [part.partition("=") for part in parts]
    if not pairs or not all(stage and sign and backend for stage, sign, backend in pairs):
        raise ConfigError(f"plan {text!r} is neither auto, a backend, nor stage=backend,…")
    return {stage.strip(): backend.strip() for stage, _, backend in pairs}


def expand_plan(plan: PlanSetting, stages: Collection[str]) -> dict[str, str]:
    """Return the backend setting of each stage.

    Raises:
        ConfigError: the plan names an unknown stage.
    """
    if isinstance(plan, str):
        return dict.fromkeys(stages, plan)
    if unknown := sorted(plan.keys() - {*stages, OTHERS}):
        raise ConfigError(f"plan: there is no stage {unknown[0]!r}; valid stages: {', '.join(stages)}")
    return {name: plan.get(name, plan.get(OTHERS, AUTO)) for name in stages}


@dataclass(frozen=True)
class Choice:
    """The backend of a stage, the reason, and the latencies (ms, by backend) that were compared.

    candidates: engines that compete with torch at each new shape; empty if the backend does not depend on the shape.
    """

    backend: str
    reason: str
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()


class Plan(Mapping[str, Choice]):
    """A mapping of stage names to `Choice`; prints as a table."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self._choices = dict(choices)

    def __getitem__(self, stage: str) -> Choice:
        return self._choices[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __str__(self) -> str:
        rows = [("stage", "backend", "ms", "torch ms", "reason")]
        for stage, choice in self._choices.items():
            engine_ms, torch_ms = (_format(choice.latency_ms.get(backend)) for backend in (choice.backend, TORCH))
            rows.append((stage, choice.backend, engine_ms, torch_ms, choice.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _format(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"
