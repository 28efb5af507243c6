"""The stage `motion_flow`: pairs of pictures to the optical flow between them."""

from __future__ import annotations

from frostline.models.vision.raft import SMALLEST_SIDE, STRIDE, FlowSize, RaftFlow
from frostline.rewards.motion import STAGE
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.stages.shapes import ShapeRange

PAIRS_AT_ONCE = 8
"""Maximum number of pairs in one call."""

_LONGEST = 4
"""Engines support sides up to this multiple of the shortest side, for any range of videos."""

# Outputs are in pixels rather than around 1, and each update starts from the rounded result of the previous one.
_TOLERANCE = Tolerance(atol=1e-3, rtol=1e-3, cosine=0.99999)


def flow_stage(network: RaftFlow, shapes: ShapeRange, shortest: int | None) -> Stage:
    """Return the stage of the frozen uses: references and scoring.

    Args:
        shortest: see `FlowSize`.
    """
    pictures = (Dimension("pairs", 1, 2, PAIRS_AT_ONCE), 3, *_sides(shapes, shortest))
    inputs = (TensorSpec("first", pictures), TensorSpec("second", pictures))
    return Stage(
        name=STAGE,
        model="raft_small",
        description=(
            "Estimate the optical flow, x and y in pixels, from each first picture to the second, RGB in [-1, 1]."
        ),
        networks=(Network("raft", network, inputs, ("flow",)),),
        tolerance=_TOLERANCE,
    )


def _sides(shapes: ShapeRange, shortest: int | None) -> tuple[Dimension, Dimension]:
    """Return height and width of the preprocessed frames, in blocks of `STRIDE` pixels."""
    low = SMALLEST_SIDE // STRIDE
    typical, largest = (FlowSize.of(shapes.height[k], shapes.width[k], shortest) for k in (1, 2))
    longest = max(largest.padded_height, largest.padded_width, _LONGEST * (shortest or SMALLEST_SIDE)) // STRIDE
    height, width = (
        Dimension(name, low, min(side // STRIDE, longest), longest, STRIDE, STRIDE)
        for name, side in (("flow_height", typical.padded_height), ("flow_width", typical.padded_width))
    )
    return height, width
