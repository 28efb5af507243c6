"""Rewards that compute features of each frame (or of a few consecutive ones) and pool them into a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from frostline.rewards.inputs import COMPARES
from frostline.rewards.reward import Reward, RewardScore

# A reward may be one file that includes its settings, which must be read without importing torch.
if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.active import RewardStages
    from frostline.rewards.inputs import Need, RewardInputs


class FrameReward(Reward):
    """Computes a few numbers (features) for each frame, and pools those of a video into a score.

    Training scores whole batches. `frostline score` computes features while frames are decoded and pools them at the
    end, so that a long video takes no more memory than a short one.

    Attributes:
        window: number of frames for one row of features: a frame and the `window - 1` frames before it.
        uses_start: whether frame 0, the given first frame of the generated video, counts in training.
    """

    window: ClassVar[int] = 1
    uses_start: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """Return what it needs of a sample; override this if it depends on the settings."""
        return self.Config.needs

    @property
    def needs_reference(self) -> bool:
        """Return whether it uses the reference or the clip."""
        return bool(self.needs & COMPARES)

    @abstractmethod
    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Compute features without a gradient, with networks on the planned backends.

        Args:
            frames: (B, T, 3, H, W) in [0, 1], consecutive.
        Returns:
            (B, T - window + 1, D) float32.
        """

    def live_features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Compute the same features in PyTorch, differentiable with respect to the frames."""
        return self.features(frames, run)

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> Mapping[str, Tensor]:
        """Return what to keep of the reference, without a gradient: tensors of B rows.

        Args:
            features: (B, R, D) of the reference's frames; None if `needs_reference` is false.
            prompts: B prompts.
        """
        return {}

    @abstractmethod
    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Score videos from their features (B, T, D), differentiable with respect to them. T is at least 1."""

    def references(self, sample: RewardInputs, run: RewardStages) -> Mapping[str, Tensor]:
        """Compute features of the reference pictures or, without pictures, of the clip, and return the result of
        `reference`.

        A reward that needs the clip uses it even if there are pictures.
        """
        features = None
        if self.needs_reference:
            pictures = sample.reference[0] if sample.reference and "clip" not in self.needs else None
            # Samples with their own pictures are processed one by one.
            frames = self._scored(sample.video) if pictures is None else pictures[None]
            features = self.features(frames, run)
        return self.reference(features, sample.prompts, run)

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1]; differentiable with respect to them if gradients are
        enabled.
        """
        import torch

        compute = self.live_features if torch.is_grad_enabled() and frames.requires_grad else self.features
        return self.pool(compute(self._scored(frames), run), references)

    def _scored(self, frames: Tensor) -> Tensor:
        return frames if self.uses_start else frames[:, 1:]
