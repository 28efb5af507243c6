"""The motion reward: amount of motion relative to the reference. This module contains only its settings."""

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
"""Download URL of torchvision's weights of `raft_small`."""

STAGE = "motion_flow"


class Config(RewardConfig):
    """As much motion as in the reference, `rewards: [{type: motion, weight: 0.05}]`: 0 is the best score."""

    # The clip of a sample is the reference; its flow is computed without a gradient.
    uses: ClassVar[tuple[Use, ...]] = (
        Use(STAGE, live=False, count=1, phase="conditioning"),
        Use(STAGE, live=True, count=1, phase="reward"),
    )
    stage_code: ClassVar[tuple[str, ...]] = (f"{__name__}.stages",)
    needs: ClassVar[frozenset[Need]] = frozenset({"clip"})
    needs_neighbours: ClassVar[bool] = True

    flow: Literal["pixels", "raft"] = Field(
        default="pixels",
        description="measure of motion: pixels, the change of luminance between frames, which needs no "
        "weights; or raft, the length of the optical flow",
    )
    weights: Path | None = Field(
        default=None,
        description="for raft: file of torchvision's raft_small, .pth or .safetensors; it is not downloaded",
    )
    updates: int = Field(default=12, ge=1, le=32, description="for raft: number of refinements of the flow")
    size: int | None = Field(
        default=None,
        ge=128,
        description="for raft: shortest side in pixels to which frames are resized; by default, frames are "
        "only enlarged to 128 if they are smaller",
    )
    floor: float = Field(
        default=1e-4,
        gt=0,
        description="constant that is added to both amounts of motion (see flow), so that videos without "
        "motion are valid",
    )

    @model_validator(mode="after")
    def _weights_go_with_raft(self) -> Self:
        if (self.flow == "raft") == (self.weights is None):
            raise ValueError(
                f"flow: raft needs weights: download {WEIGHTS}, and set weights to its path"
                if self.flow == "raft"
                else "flow: pixels does not use weights: set flow to raft, or remove weights"
            )
        return self

    def step_uses(self) -> tuple[Use, ...]:
        """Return the uses of the network, if there is one."""
        return self.uses if self.flow == "raft" else ()

    def build(self) -> Reward:
        """Load the network, if there is one.

        Raises:
            ConfigError: its file is missing or belongs to another network.
        """
        from frostline.rewards.motion.reward import MotionReward

        return MotionReward(self)
