"""Name the measures of a run's validation samples: those of rewards and judges, and all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.rewards.active import JUDGE
from frostline.train.loop.evaluation import PSNR

Lines = Sequence[Mapping[str, Any]]
"""The lines of validation.jsonl, at least one."""


@dataclass(frozen=True)
class Measures:
    """The names of the measures.

    Attributes:
        rewards: the rewards of training.
        judges: the judges.
        others: all other measures.
        about: a description of each reward and judge, by name.
    """

    rewards: tuple[str, ...]
    judges: tuple[str, ...]
    others: tuple[str, ...]
    about: Mapping[str, str]

    @classmethod
    def of(cls, validation: Lines, facts: Mapping[str, Any]) -> Measures:
        """Return the measures of the last validation; without validations, only the rewards and judges of the run."""
        last = validation[-1] if validation else {}
        rewards, judges = (_names(last.get(role) or facts.get(role)) for role in ("rewards", "judges"))
        numbers = [name for name, value in last.items() if is_number(value) and name != "step"]
        others = tuple(name for name in numbers if name not in (*rewards, *judges))
        about = facts.get("about")
        return cls(rewards, judges, others, about if isinstance(about, Mapping) else {})

    @property
    def of_rewards(self) -> tuple[str, ...]:
        """Return the other measures that do not come from judges."""
        return tuple(name for name in self.others if not name.startswith(JUDGE))

    @property
    def ratios(self) -> tuple[str, ...]:
        """Return the other measures that are ratios to the reference."""
        return tuple(name for name in self.others if name.endswith("_ratio"))


def label(name: str) -> str:
    """Return a measure's display name: "Face score" for `face_score`, "Judge: face dlib" for `judge_face_dlib`."""
    if name == PSNR:
        return "PSNR to ground truth, dB"
    words = name.removeprefix(JUDGE).replace("_", " ")
    return f"Judge: {words}" if name.startswith(JUDGE) else words[:1].upper() + words[1:]


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(value: object) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
