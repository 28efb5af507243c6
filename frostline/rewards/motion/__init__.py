"""The motion reward: does a generated video move as much as the reference? Here are its settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import Need
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward

WEIGHTS = "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth"
"""Where torchvision publishes the weights of `raft_small`."""

STAGE = "motion_flow"


class Config(RewardConfig):
    """As much motion as in the reference, `rewards: [{type: motion, weight: 0.05}]`: 0 is the best score."""

    # The clip of a sample is the reference, whose flow is computed without gradient.
    uses: ClassVar[tuple[Use, ...]] = (
        Use(STAGE, live=False, count=1, phase="conditioning"),
        Use(STAGE, live=True, count=1, phase="reward"),
    )
    stage_code: ClassVar[tuple[str, ...]] = (f"{__name__}.stages",)
    needs: ClassVar[frozenset[Need]] = frozenset({"clip"})
    needs_neighbours: ClassVar[bool] = True

    flow: Literal["pixels", "raft"] = Field(
        default="pixels",
        description="what motion is measured by: pixels, the change of luminance between frames, which needs no "
        "weights; or raft, the length of the optical flow",
    )
    weights: Path | None = Field(
        default=None, description="of raft: file of torchvision's raft_small, .pth or .safetensors; none is downloaded"
    )
    updates: int = Field(default=12, ge=1, le=32, description="of raft: how many times the flow is refined")
    size: int | None = Field(
        default=None,
        ge=128,
        description="of raft: pixels of the shortest side that frames are resized to; by default they are only "
        "enlarged, to 128, where they are smaller",
    )
    floor: float = Field(
        default=1e-4, gt=0, description="motion (see flow) that is added to both, so that videos may stand still"
    )

    @model_validator(mode="after")
    def _weights_go_with_raft(self) -> Self:
        if (self.flow == "raft") == (self.weights is None):
            raise ValueError(
                f"flow: raft needs weights, the path of a file such as {WEIGHTS}"
                if self.flow == "raft"
                else "flow: pixels takes no weights: set flow to raft, or leave weights out"
            )
        return self

    def step_uses(self) -> tuple[Use, ...]:
        """Of the network, if there is one."""
        return self.uses if self.flow == "raft" else ()

    def build(self) -> Reward:
        """Load the network, if there is one.

        Raises:
            ConfigError: its file is missing or of another network.
        """
        from frostline.rewards.motion.reward import MotionReward

        return MotionReward(self)
