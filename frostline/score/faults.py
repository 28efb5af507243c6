"""Distinguish errors of one video from errors of the program."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from frostline.allocation import is_out_of_memory
from frostline.errors import DataError
from frostline.score.rewards.base import ScoredReward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """The reason why a reward failed on some frames."""

    reason: str


def fault_of(reward: ScoredReward, error: Exception, size: str = "") -> str:
    """Return the message for an error that only concerns one video; raise any other error.

    Args:
        reward: the reward that raised the error.
        error: the error. Every error of a custom reward concerns its video.
        size: width and height of the frames, for the message.
    """
    if is_out_of_memory(error):
        return f"out of memory with frames of {size}" if size else "out of memory"
    if isinstance(error, DataError):
        return str(error)
    if not reward.of_the_user:
        raise error
    log.debug("the reward %s failed", reward.label, exc_info=error)
    return f"{type(error).__name__}: {error}"
