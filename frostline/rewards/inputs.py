"""The inputs of a reward besides the generated frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

# The cache key of conditions depends on the imports of this file.
if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["prompt", "reference", "clip", "latents"]
"""What a reward may need of a sample: its prompt, its reference (pictures, otherwise its clip), its clip even if there
are pictures, or the generated latents.
"""
COMPARES: frozenset[Need] = frozenset({"reference", "clip"})
"""The needs of rewards that compare with a reference; in `frostline score`, this is a given video or picture."""
KEEPS: frozenset[Need] = frozenset({*COMPARES, "prompt"})
"""The needs of rewards that keep data of each sample: their `references` method is called."""


@dataclass(frozen=True, eq=False)
class RewardInputs:
    """B samples.

    Attributes:
        prompts: B prompts.
        video: the clip of each sample, (B, T, 3, H, W) in [0, 1]; frame 0 is the given first frame of the generated
            video.
        valid_frames: number of frames of each clip that count; later frames are copies of the last one. It is 2 for a
            picture, because rewards skip frame 0, and 0 for a sample without a video, whose frames are undefined.
        reference: for each sample, pictures (R, 3, h, w) in [0, 1] of the subject, if the data contains them separately
            from the clip; None if the clip is its own reference. Every picture counts, including the first. Empty: all
            None.
        fps: frames per second of each clip; None if unknown. Empty: all None.
        latents: (B, C, F, h, w) generated latents; only if generated frames are scored.
    """

    prompts: tuple[str, ...]
    video: Tensor
    valid_frames: tuple[int, ...]
    reference: tuple[Tensor | None, ...] = ()
    fps: tuple[float | None, ...] = ()
    latents: Tensor | None = None

    def rows(self, indices: list[int]) -> RewardInputs:
        """Return some of the samples."""
        return replace(
            self,
            prompts=tuple(self.prompts[index] for index in indices),
            video=self.video[indices],
            valid_frames=tuple(self.valid_frames[index] for index in indices),
            reference=tuple(self.reference[index] for index in indices) if self.reference else (),
            fps=tuple(self.fps[index] for index in indices) if self.fps else (),
            latents=None if self.latents is None else self.latents[indices],
        )

    def row(self, index: int) -> RewardInputs:
        """Return one sample, with its clip without padding."""
        one = self.rows([index])
        return replace(one, video=one.video[:, : one.valid_frames[0]])
