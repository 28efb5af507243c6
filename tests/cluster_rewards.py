"""Rewards that end their process, like a decoder that crashes. Settings name them `cluster_rewards:…`.

The folder in `FROSTLINE_TEST_NOTES` contains the scores, and a marker for each process that was already killed.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import Reward, RewardScore

NOTES = "FROSTLINE_TEST_NOTES"
ALWAYS, ONCE = 0.9, 0.05
"""A clip brighter than `ALWAYS` kills each process that scores it; one darker than `ONCE` kills only the first."""


class Config(RewardConfig):
    """The plain settings of a reward."""


class Deadly(Reward):
    """The mean of the frames. Bright and dark clips kill the process."""

    Config = Config
    name = "deadly"

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        mean = frames.flatten(1).mean(dim=1)
        folder = os.environ.get(NOTES)
        if folder:
            with (Path(folder) / "scored").open("a") as scored:
                scored.write(f"{mean[0].item():.4f}\n")
            if mean.max() > ALWAYS or (mean.min() < ONCE and first_time(Path(folder) / "killed")):
                os.kill(os.getpid(), signal.SIGKILL)
        return RewardScore(mean, mean > -1)


class Fragile(Deadly):
    """A kind of sharpness. The first process of rank 1 is killed in its third call that needs a gradient."""

    name = "fragile"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.calls = 0

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        folder = os.environ.get(NOTES)
        self.calls += frames.requires_grad
        if folder and self.calls == 3 and os.environ["RANK"] == "1" and first_time(Path(folder) / "lost"):
            os.kill(os.getpid(), signal.SIGKILL)
        differences = (frames[..., 1:] - frames[..., :-1]).abs().flatten(1).mean(dim=1)
        return RewardScore(differences, differences > -1)


def first_time(marker: Path) -> bool:
    """Return whether this is the first call for this marker."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
