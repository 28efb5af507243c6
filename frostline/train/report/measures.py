"""What a run's report calls the measures of its held-out starts, which are those that rewards and judges give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.rewards.active import JUDGE
from frostline.train.loop.evaluation import PSNR

Lines = Sequence[Mapping[str, Any]]
"""Those of validation.jsonl, at least one."""


@dataclass(frozen=True)
class Measures:
    """The names of what was measured: what training rewards, what judges say, and the rest, each in its order.

    about: what rewards and judges say of themselves.
    """

    rewards: tuple[str, ...]
    judges: tuple[str, ...]
    others: tuple[str, ...]
    about: Mapping[str, str]

    @classmethod
    def of(cls, validation: Lines, facts: Mapping[str, Any]) -> Measures:
        """Those of the last validation; where a run has none, its rewards alone."""
        last = validation[-1] if validation else {}
        rewards, judges = (_names(last.get(role) or facts.get(role)) for role in ("rewards", "judges"))
        numbers = [name for name, value in last.items() if is_number(value) and name != "step"]
        others = tuple(name for name in numbers if name not in (*rewards, *judges))
        about = facts.get("about")
        return cls(rewards, judges, others, about if isinstance(about, Mapping) else {})

    @property
    def of_rewards(self) -> tuple[str, ...]:
        """Of the others, those that no judge gave."""
        return tuple(name for name in self.others if not name.startswith(JUDGE))

    @property
    def ratios(self) -> tuple[str, ...]:
        """Of the others, those of which 1 is like the reference."""
        return tuple(name for name in self.others if name.endswith("_ratio"))


def label(name: str) -> str:
    """A measure's name as a reader wants it: `face_score` as Face score, `judge_face_dlib` as Judge: face dlib."""
    if name == PSNR:
        return "PSNR to truth, dB"
    words = name.removeprefix(JUDGE).replace("_", " ")
    return f"Judge: {words}" if name.startswith(JUDGE) else words[:1].upper() + words[1:]


def is_number(value: object) -> bool:
    """Whether a line has a figure there."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(value: object) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
