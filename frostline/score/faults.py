"""What goes wrong with one video, told from what is wrong with the program."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from frostline.allocation import is_out_of_memory
from frostline.errors import DataError
from frostline.score.rewards.base import ScoredReward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Why a reward could not look at some frames."""

    reason: str


def fault_of(reward: ScoredReward, error: Exception, size: str = "") -> str:
    """What to say of an error that is a matter of one video; any other one is raised."""
    if is_out_of_memory(error):
        return f"frames of {size} need more memory than there is" if size else "needs more memory than there is"
    if isinstance(error, DataError):
        return str(error)
    if not reward.of_the_user:
        raise error
    log.debug("the reward %s", reward.label, exc_info=error)
    return f"{type(error).__name__}: {error}"
