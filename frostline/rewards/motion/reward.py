"""The amount of motion in a video relative to the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from frostline.models.video_shape import VideoShape
from frostline.models.vision.raft import FlowSize, load_raft
from frostline.rewards.active import RewardStages
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.motion import STAGE
from frostline.rewards.motion import Config as MotionConfig
from frostline.rewards.motion.stages import PAIRS_AT_ONCE, flow_stage
from frostline.rewards.reward import LiveNetwork, RewardScore
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange

_LUMA = (0.299, 0.587, 0.114)
# Maximum number of pixels of all pairs in one call: limits the correlations, which grow quadratically, to about 1 GB.
_PIXELS_AT_ONCE = 500_000


class MotionReward(FrameReward):
    """`-log(m / m_ref)^2`, where m is the mean motion between neighbouring frames.

    0 is the best score: as much motion as in the reference. Too little motion is penalised like too much.

    Motion is measured between consecutive frames, independent of the frame rate: the mean length of the optical flow as
    a fraction of the frame's diagonal, or the mean absolute change of the luminance in [0, 1].
    """

    Config = MotionConfig
    name = "motion"
    unscored = "a reference without motion"
    window = 2
    uses_start = True

    def __init__(self, config: MotionConfig) -> None:
        self.config = config
        self.network = load_raft(config.weights, config.updates) if config.weights else None

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return `motion_flow`, if motion is measured with it."""
        return () if self.network is None else (flow_stage(self.network, shapes, self.config.size),)

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        """Return the network with the pairs of one call: calls are checkpointed; backward recomputes one at a time."""
        if self.network is None:
            return ()
        size = FlowSize.of(shape.height, shape.width, self.config.size)
        device = next(self.network.parameters()).device
        picture = torch.zeros(1, 3, size.padded_height, size.padded_width, device=device)
        pairs = min(_pairs_at_once(size), shape.batch_size * (shape.num_frames - 1))
        return (LiveNetwork(STAGE, self.network, (picture, picture), max(1, pairs)),)

    @torch.no_grad()
    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Return (B, T - 1, 2): the motion from each frame to the next, and the mean absolute change of luminance."""
        if self.network is None:
            return self.live_features(frames, run)
        flow = run[STAGE]
        return self._features(frames, lambda first, second: flow(first=first, second=second)["flow"])

    def live_features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Return the same features in PyTorch, differentiable with respect to the frames."""
        network = self.network
        if network is None:
            change = _change(frames)
            return torch.stack([change, change], dim=2)
        with run.live(STAGE):
            return self._features(frames, partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False))

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> dict[str, Tensor]:
        """Return the motion (B,) of the reference, and whether (B,) there is any; a repeated picture has none."""
        assert features is not None
        return {"motion": self._pooled(features), "moves": features[..., 1].sum(dim=1) > 0}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Score videos whose reference has motion."""
        valid = references["moves"]
        ratio = torch.where(valid, self._pooled(features) / references["motion"], 1)
        return RewardScore(-ratio.log().square(), valid, {"motion_ratio": ratio.detach()})

    def _features(self, frames: Tensor, flow: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Compute features with a function from first and second pictures (N, 3, h, w) to the flow (N, 2, h, w)."""
        size = FlowSize.of(frames.shape[-2], frames.shape[-1], self.config.size)
        first, second = (part.flatten(0, 1).split(_pairs_at_once(size)) for part in (frames[:, :-1], frames[:, 1:]))
        # The reward is computed in float32, independent of the trainer's autocast.
        with torch.autocast(frames.device.type, enabled=False):
            motion = [size.motion(flow(size.prepare(a), size.prepare(b))) for a, b in zip(first, second, strict=True)]
        change = _change(frames)
        return torch.stack([torch.cat(motion).reshape(change.shape), change], dim=2)

    def _pooled(self, features: Tensor) -> Tensor:
        """Return (B,) means plus `floor`; the mean of no pairs is 0."""
        return features[..., 0].sum(dim=1) / max(1, features.shape[1]) + self.config.floor


def _pairs_at_once(size: FlowSize) -> int:
    pixels = size.padded_height * size.padded_width
    return min(max(1, _PIXELS_AT_ONCE // pixels), PAIRS_AT_ONCE)


def _change(frames: Tensor) -> Tensor:
    """Return (B, T - 1) mean absolute differences of luminance between consecutive (B, T, 3, H, W) frames in [0, 1]."""
    frames = frames.float()
    luma = (frames * frames.new_tensor(_LUMA)[:, None, None]).sum(dim=2)
    return (luma[:, 1:] - luma[:, :-1]).abs().mean(dim=(2, 3))
