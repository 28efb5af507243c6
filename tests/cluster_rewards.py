"""Rewards that end their process, as a decoder does that crashes: named by settings as `cluster_rewards:…`.

A folder that `FROSTLINE_TEST_NOTES` names keeps what was scored, and what killed a process once already.
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
"""Clips that are brighter kill whoever scores them; those that are darker the first one."""


class Config(RewardConfig):
    """The plain settings of a reward."""


class Deadly(Reward):
    """The mean of the frames, for those who survive it."""

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
    """Sharpness of a kind, whose first process number 1 is killed in its third call that has a gradient."""

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
    """Whether nobody was here before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
