"""Rewards whose features are the output of an image network for each frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from frostline.models.precision import parse_precision
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import RewardStages
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.frame_selection import count_selected
from frostline.rewards.inputs import Need
from frostline.rewards.reward import LiveNetwork
from frostline.rewards.vision.settings import VisionConfig
from frostline.rewards.vision.stages import ImageNetwork, image_stage
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange


class VisionReward(FrameReward):
    """Prepares frames and computes the features of each: on engines, or in PyTorch if a gradient is needed.

    Args:
        image: an `ImageNetwork`; its stage is `<type>_image`.
        prepare: maps frames (N, 3, H, W) in [0, 1] to its input, differentiable.
        files: small files that affect the result, besides the weights.
    Attributes:
        description: what the image network computes, for the users of its ONNX file.
    """

    Config = VisionConfig
    description: ClassVar[str]

    def __init__(
        self,
        config: VisionConfig,
        image: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        files: Sequence[Path] = (),
    ) -> None:
        self.config = config
        self.name = config.type
        self.image = image.to(parse_precision(config.precision))
        self.prepare = prepare
        self.reference_files = tuple(files)
        self.at_once = ShapeRange().images[-1]

    @property
    def needs(self) -> frozenset[Need]:
        """Return what the settings require."""
        return self.config.needs

    @property
    def image_stage_name(self) -> str:
        """Return the name of the image network's stage."""
        return f"{self.config.type}_image"

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stage of the image network."""
        self.at_once = shapes.images[-1]
        return (image_stage(self.image_stage_name, self.image, self.description, self.config.license, shapes),)

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        """Return the image network, used once for each selected frame."""
        side = cast(ImageNetwork, self.image).image_size
        picture = torch.zeros(1, 3, side, side, device=next(self.image.parameters()).device)
        frames = count_selected(shape.num_frames, self.config.frames) + self.uses_start
        return (LiveNetwork(self.image_stage_name, self.image, (picture,), shape.batch_size * frames),)

    @torch.no_grad()
    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Return (B, T, D), computed for as many frames at once as an engine supports."""
        serve = run[self.image_stage_name]
        features = [serve(images=images)["features"] for images in self._prepared(frames)]
        return torch.cat(features).unflatten(0, frames.shape[:2])

    def live_features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Return (B, T, D), computed in PyTorch, differentiable with respect to the frames."""
        images = torch.cat([*self._prepared(frames)])
        with run.live(self.image_stage_name):
            features = self.image(images)
        return features.unflatten(0, frames.shape[:2])

    def _prepared(self, frames: Tensor) -> Iterator[Tensor]:
        """Prepare a few frames at a time: intermediate results are as large as the frames."""
        return (self.prepare(part) for part in frames.flatten(0, 1).split(self.at_once))
