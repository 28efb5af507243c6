"""Rewards that look at each frame by itself, or with the few before it, and pool what they saw."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from frostline.rewards.inputs import COMPARES
from frostline.rewards.reward import Reward, RewardScore

# A reward may be one file with its settings, which must be read without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from frostline.rewards.active import RewardStages
    from frostline.rewards.inputs import Need, RewardInputs


class FrameReward(Reward):
    """Computes a few numbers for each frame, its features, and pools those of a video into a score.

    Training scores whole batches; `frostline score` computes the features while frames are decoded and pools them at
    the end, so that a long video takes no more memory than a short one.

    Attributes:
        window: frames that one row of features is computed from: a frame and the `window - 1` before it.
        uses_start: whether frame 0 counts in training, where it is the start frame that the generated video is given.
    """

    window: ClassVar[int] = 1
    uses_start: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """Return what it needs of a sample; a class whose settings decide that returns what they say."""
        return self.Config.needs

    @property
    def needs_reference(self) -> bool:
        """Return whether it looks at the reference, or at the clip."""
        return bool(self.needs & COMPARES)

    @abstractmethod
    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Compute features without gradient, networks on the plan's backends.

        Args:
            frames: (B, T, 3, H, W) in [0, 1], consecutive.
        Returns:
            (B, T - window + 1, D) float32.
        """

    def live_features(self, frames: Tensor, run: RewardStages) -> Tensor:
        """Compute the same features in PyTorch, differentiable to the frames."""
        return self.features(frames, run)

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> Mapping[str, Tensor]:
        """Return what is kept of the reference, without gradient: tensors of B rows.

        Args:
            features: (B, R, D) of the reference's frames; None where `needs_reference` is false.
            prompts: B of them.
        """
        return {}

    @abstractmethod
    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Score videos by their features (B, T, D), differentiable to them. T is at least 1."""

    def references(self, sample: RewardInputs, run: RewardStages) -> Mapping[str, Tensor]:
        """Compute features of the reference pictures, or else of the clip, and keep what `reference` says of them.

        A reward that needs the clip looks at that, whatever pictures there are.
        """
        features = None
        if self.needs_reference:
            pictures = sample.reference[0] if sample.reference and "clip" not in self.needs else None
            # Samples with pictures of their own come one by one.
            frames = self._scored(sample.video) if pictures is None else pictures[None]
            features = self.features(frames, run)
        return self.reference(features, sample.prompts, run)

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Score generated (B, T, 3, H, W) frames in [0, 1], differentiable to them where gradients are enabled."""
        import torch

        compute = self.live_features if torch.is_grad_enabled() and frames.requires_grad else self.features
        return self.pool(compute(self._scored(frames), run), references)

    def _scored(self, frames: Tensor) -> Tensor:
        return frames if self.uses_start else frames[:, 1:]
